import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    roc_auc_score,
    top_k_accuracy_score,
)
from sklearn.metrics import (
    confusion_matrix as sklearn_confusion_matrix,
)

from vlkr.errors import VlkrError
from vlkr.evaluation.metrics import (
    base_to_new,
    classification_metrics,
    confusion_matrix,
    domain_accuracy,
    effective_robustness,
    open_set_auroc,
    reliability,
    worst_confusions,
)
from vlkr.evaluation.predictions import Predictions, predict

pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")


def said(logits, labels, domains=None):
    keys = [f"{i:05d}" for i in range(len(labels))]
    return predict(logits, labels, keys, domains or [None] * len(labels))


def compute(logits, labels):
    return classification_metrics(said(logits, labels), logits.shape[1])


def expected_calibration_error(probabilities, labels, bins=15):
    """Guo et al. (2017), equation 3, bin by bin."""
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    error = 0.0
    for i in range(bins):
        low, high = i / bins, (i + 1) / bins
        inside = (confidence >= low) & (confidence < high if i < bins - 1 else confidence <= high)
        if inside.any():
            gap = (predicted == labels)[inside].mean() - confidence[inside].mean()
            error += inside.mean() * abs(gap)
    return error


@pytest.mark.parametrize("num_classes", [2, 3, 10, 200])
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 100.0])
def test_random_logits_against_scikit_learn(num_classes, sharpness):
    logits = sharpness * torch.randn(500, num_classes)
    labels = torch.randint(num_classes, (500,))
    labels[:100] = logits[:100].argmax(1)
    values = compute(logits, labels)
    y, scores = labels.numpy(), logits.numpy()
    probabilities = logits.double().softmax(1).numpy()
    expected = {
        "acc1": accuracy_score(y, scores.argmax(1)),
        "acc5": 1.0,
        "mean_per_class_recall": balanced_accuracy_score(y, scores.argmax(1)),
        "f1": f1_score(y, scores.argmax(1), average="macro"),
        "ece": expected_calibration_error(probabilities, y),
        "nll": -logits.double().log_softmax(1)[range(500), labels].mean().item(),
    }
    if num_classes > 5:
        expected["acc5"] = top_k_accuracy_score(y, scores, k=5, labels=range(num_classes))
    assert values == pytest.approx(expected, abs=1e-6)
    if sharpness < 10:  # scikit-learn clips probabilities at float64's epsilon
        assert values["nll"] == pytest.approx(log_loss(y, probabilities, labels=range(num_classes)))
    assert all(value == round(value, 6) for value in values.values())


def test_one_class_among_the_labels():
    logits = torch.randn(50, 10)
    logits[:20, 3] = 10
    labels = torch.full((50,), 3)
    values = compute(logits, labels)
    accuracy = (logits.argmax(1) == 3).double().mean().item()
    assert values["acc1"] == pytest.approx(accuracy)
    assert values["mean_per_class_recall"] == pytest.approx(accuracy)
    f1 = f1_score(labels.numpy(), logits.argmax(1).numpy(), average="macro")
    assert values["f1"] == pytest.approx(f1, abs=1e-6)


def test_one_image():
    values = compute(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
    p = math.exp(2) / (math.exp(2) + 2)
    assert values == pytest.approx(
        {"acc1": 1, "acc5": 1, "mean_per_class_recall": 1, "f1": 1}
        | {"ece": 1 - p, "nll": -math.log(p)},
        abs=1e-6,
    )


def test_class_that_is_absent_from_the_labels():
    logits, labels = torch.randn(300, 6), torch.randint(5, (300,))
    values = compute(logits, labels)
    recall = balanced_accuracy_score(labels.numpy(), logits.argmax(1).numpy())
    f1 = f1_score(labels.numpy(), logits.argmax(1).numpy(), average="macro")
    assert values["mean_per_class_recall"] == pytest.approx(recall, abs=1e-6)
    assert values["f1"] == pytest.approx(f1, abs=1e-6)


def test_ties_count_neither_double_nor_as_more_than_a_guess():
    logits = torch.randint(3, (400, 8)).float()
    labels = torch.randint(8, (400,))
    own = logits.gather(1, labels[:, None])
    values = compute(logits, labels)
    for name, k in (("acc1", 1), ("acc5", 5)):
        strict = ((logits >= own).sum(1) <= k).double().mean().item()
        lenient = ((logits > own).sum(1) < k).double().mean().item()
        assert strict <= values[name] <= lenient
    constant = compute(torch.zeros(400, 8), torch.arange(8).repeat(50))
    assert constant["acc1"] == pytest.approx(1 / 8)
    assert constant["acc5"] == pytest.approx(5 / 8)
    assert constant["ece"] == pytest.approx(0, abs=1e-6)
    assert constant["nll"] == pytest.approx(math.log(8), abs=1e-6)


def test_right_and_wrong_with_certainty():
    labels = torch.arange(6).repeat(3)
    right = compute(1000 * torch.eye(6)[labels], labels)
    assert right == {
        "acc1": 1,
        "acc5": 1,
        "mean_per_class_recall": 1,
        "f1": 1,
        "ece": 0,
        "nll": 0,
    }
    wrong = compute(1000 * torch.eye(6)[(labels + 1) % 6], labels)
    found = (wrong[name] for name in ("acc1", "mean_per_class_recall", "f1", "ece", "nll"))
    assert tuple(found) == (0, 0, 0, 1, 1000)


def test_certain_and_nearly_certain_share_the_last_bin():
    # Half of the images certain and right, half nearly certain and wrong: as one bin the gap is
    # half, as two it would be the mean of 0 and 1.
    logits = torch.tensor([[1000.0, 0.0], [5.0, 0.0]]).repeat(50, 1)
    labels = torch.tensor([0, 1]).repeat(50)
    confidence = (1 + 1 / (1 + math.exp(-5))) / 2
    assert compute(logits, labels)["ece"] == pytest.approx(confidence - 0.5, abs=1e-6)
    assert len(reliability(said(logits, labels))) == 1


def test_imbalance_weighs_images_in_accuracy_and_classes_in_recall():
    logits = torch.eye(2)[torch.zeros(10, dtype=torch.long)]  # always class 0
    labels = torch.tensor([0] * 9 + [1])
    values = compute(logits, labels)
    assert values["acc1"] == pytest.approx(0.9)
    assert values["mean_per_class_recall"] == pytest.approx(0.5)
    assert values["f1"] == pytest.approx((2 * 9 / 19 + 0) / 2, abs=1e-6)


def test_bf16_logits_are_measured_in_fp64():
    logits, labels = torch.randn(200, 5).bfloat16(), torch.randint(5, (200,))
    probabilities = logits.double().softmax(1).numpy()
    values = compute(logits, labels)
    expected = expected_calibration_error(probabilities, labels.numpy())
    assert values["ece"] == pytest.approx(expected, abs=1e-6)
    assert values["nll"] == pytest.approx(log_loss(labels.numpy(), probabilities), abs=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite(bad):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(VlkrError, match="not finite"):
        said(logits, torch.zeros(3, dtype=torch.long))


def test_nothing_to_measure():
    nothing = Predictions([], [], [], [], [], [], [])
    some = said(torch.eye(2), torch.arange(2))
    with pytest.raises(VlkrError, match="no predictions to measure"):
        classification_metrics(nothing, 3)
    for pair in ((nothing, some), (some, nothing)):
        with pytest.raises(VlkrError, match="no predictions to measure"):
            open_set_auroc(*pair)


def test_reliability_bins_make_the_calibration_error():
    logits, labels = 2 * torch.randn(700, 7), torch.randint(7, (700,))
    bins = reliability(said(logits, labels))
    probabilities = logits.double().softmax(1).numpy()
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    for part in bins:
        inside = (confidence >= part.lower) & (confidence < part.upper)
        assert part.images == inside.sum() > 0
        assert part.accuracy == pytest.approx(correct[inside].mean(), abs=1e-6)
        assert part.confidence == pytest.approx(confidence[inside].mean(), abs=1e-6)
        assert part.upper - part.lower == pytest.approx(1 / 15, abs=1e-5)
    assert sum(part.images for part in bins) == 700
    error = sum(part.images / 700 * abs(part.accuracy - part.confidence) for part in bins)
    assert error == pytest.approx(compute(logits, labels)["ece"], abs=1e-5)


def test_confusions():
    names = ["cat", "dog", "fox"]
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    answers = torch.tensor([1] * 6 + [0] * 4 + [0] * 3 + [1] + [2, 2])
    found = confusion_matrix(said(torch.eye(3)[answers], labels), 3)
    assert found.tolist() == sklearn_confusion_matrix(labels, answers).tolist()
    pairs = worst_confusions(found, names)
    assert [(p.label, p.predicted, p.images, p.fraction) for p in pairs] == [
        ("cat", "dog", 6, 0.6),
        ("dog", "cat", 3, 0.75),
    ]
    assert worst_confusions(found, names, 1) == pairs[:1]
    assert worst_confusions(torch.eye(3, dtype=torch.long), names) == []


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_of_unknown_classes(ties):
    known, unknown = 3 * torch.randn(80, 4), 2 * torch.randn(50, 4)
    if ties:
        known, unknown = known.round() / 2, unknown.round() / 2
    confidence = torch.cat([known, unknown]).double().softmax(1).amax(1).numpy()
    # The same logits in another order are a tie, whatever fp64's last digit says.
    expected = roc_auc_score([1] * 80 + [0] * 50, np.round(confidence, 12))
    parts = [said(part, torch.zeros(len(part), dtype=torch.long)) for part in (known, unknown)]
    assert open_set_auroc(*parts) == pytest.approx(expected, abs=1e-5)


def test_auroc_of_certain_and_of_equal_confidences():
    labels = torch.zeros(5, dtype=torch.long)
    sure, unsure = said(1000 * torch.eye(5), labels), said(torch.zeros(5, 5), labels)
    assert open_set_auroc(sure, unsure) == 1
    assert open_set_auroc(unsure, sure) == 0
    assert open_set_auroc(sure, sure) == 0.5


def test_accuracy_by_domain():
    logits, labels = torch.randn(90, 3), torch.randint(3, (90,))
    domains = [("art", "photo", "sketch")[i % 3] for i in range(90)]
    found = domain_accuracy(said(logits, labels, domains), ("photo", "sketch", "art"))
    assert list(found) == ["photo", "sketch", "art"]
    right = (logits.argmax(1) == labels).numpy()
    for name, accuracy in found.items():
        inside = np.array(domains) == name
        assert accuracy.images == 30
        assert accuracy.acc1 == pytest.approx(right[inside].mean(), abs=1e-6)


def test_domains_that_are_empty_or_unknown():
    predictions = said(torch.eye(2), torch.arange(2), ["art", "photo"])
    with pytest.raises(VlkrError, match="domain 'sketch' is empty"):
        domain_accuracy(predictions, ("art", "photo", "sketch"))
    with pytest.raises(VlkrError, match="sample '00001' is of domain 'photo', expected one of art"):
        domain_accuracy(predictions, ("art",))
    with pytest.raises(VlkrError, match="of domain None"):
        domain_accuracy(said(torch.eye(2), torch.arange(2)), ("art",))


def logit(p):
    return math.log(p / (1 - p))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_effective_robustness_against_a_least_squares_line():
    reference = [(0.5, 0.3), (0.6, 0.45), (0.7, 0.5), (0.85, 0.7)]
    x, y = (np.array([logit(point[axis]) for point in reference]) for axis in (0, 1))
    slope, intercept = np.linalg.lstsq(np.stack([x, np.ones(4)], 1), y, rcond=None)[0]
    expected = 0.6 - sigmoid(slope * logit(0.8) + intercept)
    assert effective_robustness(0.8, 0.6, reference) == pytest.approx(expected, abs=1e-6)


def test_effective_robustness_is_zero_on_the_line_of_two_points():
    chance, zero_shot = (0.1, 0.1), (0.7, 0.4)
    for point in (chance, zero_shot):
        assert effective_robustness(*point, [chance, zero_shot]) == pytest.approx(0, abs=1e-6)
    middle = sigmoid((logit(0.1) + logit(0.7)) / 2)
    on_line = sigmoid((logit(0.1) + logit(0.4)) / 2)
    found = effective_robustness(middle, on_line + 0.05, [chance, zero_shot])
    assert found == pytest.approx(0.05, abs=1e-6)


def test_effective_robustness_of_extreme_accuracies():
    perfect = effective_robustness(1.0, 1.0, [(0.1, 0.1), (1.0, 1.0)])
    assert perfect == pytest.approx(0.001, abs=1e-6)  # the line is kept at 99.9 %
    assert effective_robustness(0.0, 0.0, [(0.1, 0.1), (0.9, 0.9)]) == pytest.approx(
        -0.001, abs=1e-6
    )


def test_effective_robustness_without_a_line():
    with pytest.raises(VlkrError, match=r"different in-distribution accuracies, got \[0\.5\]"):
        effective_robustness(0.5, 0.5, [(0.5, 0.5)])
    with pytest.raises(VlkrError, match="cannot fit a robustness baseline"):
        effective_robustness(0.5, 0.5, [(0.5, 0.5), (0.5, 0.6)])
    with pytest.raises(VlkrError, match=r"accuracy 63\.3 is out of range"):
        effective_robustness(63.3, 0.5, [(0.5, 0.5), (0.6, 0.6)])


def test_harmonic_mean_of_base_and_new():
    assert base_to_new(0.8, 0.6) == {
        "base": 0.8,
        "new": 0.6,
        "harmonic_mean": round(2 * 0.8 * 0.6 / 1.4, 6),
    }
    assert base_to_new(0.9, 0.0)["harmonic_mean"] == 0
    assert base_to_new(0.0, 0.0)["harmonic_mean"] == 0


def test_domain_of_one_image():
    one = domain_accuracy(said(torch.eye(2)[:1], torch.tensor([1]), ["art"]), ("art",))
    assert (one["art"].images, one["art"].acc1) == (1, 0)
    two = domain_accuracy(said(torch.eye(2), torch.tensor([0, 0]), ["art"] * 2), ("art",))
    assert two["art"].acc1 == 0.5


@given(st.permutations(range(12)), st.integers(1, 4))
def test_sharing_out_changes_no_digit(order, processes):
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(12, 4, generator=generator)
    labels = torch.randint(4, (12,), generator=generator)
    keys = [f"k{i}" for i in range(12)]
    whole = Predictions.joined([predict(logits, labels, keys, ["a"] * 12)])
    parts = []
    for rank in range(processes):
        own = order[rank::processes]
        parts.append(predict(logits[own], labels[own], [keys[i] for i in own], ["a"] * len(own)))
    shared = Predictions.joined(parts)
    assert shared == whole
    assert classification_metrics(shared, 4) == classification_metrics(whole, 4)


def test_effective_robustness_of_models_that_are_level_at_home():
    # A line through two points that are nearly above each other is steep, and ends at 0 or 1.
    assert effective_robustness(0.95, 0.5, [(0.7, 0.6), (0.7002, 0.4)]) == 0.5
    assert effective_robustness(0.95, 0.5, [(0.7, 0.4), (0.7002, 0.6)]) == -0.5
