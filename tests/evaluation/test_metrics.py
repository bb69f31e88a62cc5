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


def predictions(logits, labels, domains=None):
    keys = [f"{i:05d}" for i in range(len(labels))]
    return predict(logits, labels, keys, domains or [None] * len(labels))


def compute(logits, labels):
    return classification_metrics(predictions(logits, labels), logits.shape[1])


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


@pytest.mark.parametrize(
    ("num_classes", "num_labels", "sharpness", "dtype"),
    [
        (2, 2, 0.1, torch.float32),
        (3, 3, 3.0, torch.float32),
        (10, 10, 100.0, torch.float32),
        (200, 200, 3.0, torch.float32),
        pytest.param(6, 5, 1.0, torch.float32, id="a class without images"),
        pytest.param(10, 1, 1.0, torch.float32, id="one class has all images"),
        pytest.param(5, 5, 1.0, torch.bfloat16, id="bf16 logits, metrics in fp64"),
    ],
)
def test_random_logits_against_scikit_learn(num_classes, num_labels, sharpness, dtype):
    logits = (sharpness * torch.randn(500, num_classes)).to(dtype)
    labels = torch.randint(num_labels, (500,))
    labels[:100] = logits[:100, :num_labels].argmax(1)
    values = compute(logits, labels)
    y, scores = labels.numpy(), logits.float().numpy()
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


SIX = torch.arange(6).repeat(3)
P = math.exp(2) / (math.exp(2) + 2)
ALL_CORRECT = {"acc1": 1, "acc5": 1, "mean_per_class_recall": 1, "f1": 1}


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        pytest.param(
            torch.tensor([[2.0, 0.0, 0.0]]),
            torch.tensor([0]),
            ALL_CORRECT | {"ece": 1 - P, "nll": -math.log(P)},
            id="one image",
        ),
        pytest.param(
            1000 * torch.eye(6)[SIX], SIX, ALL_CORRECT | {"ece": 0, "nll": 0}, id="certain"
        ),
        pytest.param(
            1000 * torch.eye(6)[(SIX + 1) % 6],
            SIX,
            {"acc1": 0, "mean_per_class_recall": 0, "f1": 0, "ece": 1, "nll": 1000},
            id="certain and wrong",
        ),
        pytest.param(
            torch.eye(2)[[0] * 10],
            torch.tensor([0] * 9 + [1]),
            {"acc1": 0.9, "mean_per_class_recall": 0.5, "f1": (2 * 9 / 19 + 0) / 2},
            id="recall weighs classes, accuracy images",
        ),
        pytest.param(
            # As one bin the gap is half; as two bins it would be the mean of 0 and 1.
            torch.tensor([[1000.0, 0.0], [5.0, 0.0]]).repeat(50, 1),
            torch.tensor([0, 1]).repeat(50),
            {"ece": (1 + 1 / (1 + math.exp(-5))) / 2 - 0.5},
            id="certain and nearly certain share the last bin",
        ),
    ],
)
def test_values_by_hand(logits, labels, expected):
    values = compute(logits, labels)
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)


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


def test_reliability_bins_make_the_calibration_error():
    logits, labels = 2 * torch.randn(700, 7), torch.randint(7, (700,))
    bins = reliability(predictions(logits, labels))
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
    found = confusion_matrix(predictions(torch.eye(3)[answers], labels), 3)
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
    parts = [
        predictions(part, torch.zeros(len(part), dtype=torch.long)) for part in (known, unknown)
    ]
    assert open_set_auroc(*parts) == pytest.approx(expected, abs=1e-5)


def test_auroc_of_certain_and_of_equal_confidences():
    labels = torch.zeros(5, dtype=torch.long)
    sure, unsure = predictions(1000 * torch.eye(5), labels), predictions(torch.zeros(5, 5), labels)
    pairs = ((sure, unsure), (unsure, sure), (sure, sure))
    assert [open_set_auroc(*pair) for pair in pairs] == [1, 0, 0.5]


def test_accuracy_by_domain():
    logits, labels = torch.randn(91, 3), torch.randint(3, (91,))
    domains = [*(("art", "photo", "sketch")[i % 3] for i in range(90)), "single"]
    names = ("photo", "sketch", "art", "single")
    found = domain_accuracy(predictions(logits, labels, domains), names)
    assert list(found) == list(names)
    correct = (logits.argmax(1) == labels).numpy()
    for name, accuracy in found.items():
        inside = np.array(domains) == name
        assert accuracy.images == inside.sum()
        assert accuracy.acc1 == pytest.approx(correct[inside].mean(), abs=1e-6)


NOTHING = Predictions([], [], [], [], [], [], [])
TWO = predictions(torch.eye(2), torch.arange(2), ["art", "photo"])


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: classification_metrics(NOTHING, 3), "no predictions to measure"),
        (lambda: open_set_auroc(NOTHING, TWO), "no predictions to measure"),
        (lambda: open_set_auroc(TWO, NOTHING), "no predictions to measure"),
        (lambda: domain_accuracy(TWO, ("art", "photo", "sketch")), "domain 'sketch' is empty"),
        (
            lambda: domain_accuracy(TWO, ("art",)),
            "sample '00001' is of domain 'photo', expected one of art",
        ),
        (
            lambda: domain_accuracy(predictions(torch.eye(2), torch.arange(2)), ("art",)),
            "of domain None",
        ),
        *(
            (lambda bad=bad: predictions(torch.tensor([[0, bad]]), torch.tensor([0])), "not finite")
            for bad in (torch.nan, torch.inf, -torch.inf)
        ),
        (
            lambda: effective_robustness(0.5, 0.5, [(0.5, 0.5)]),
            r"different in-distribution accuracies, got \[0\.5\]",
        ),
        (
            lambda: effective_robustness(0.5, 0.5, [(0.5, 0.5), (0.5, 0.6)]),
            "cannot fit a robustness baseline",
        ),
        (
            lambda: effective_robustness(63.3, 0.5, [(0.5, 0.5), (0.6, 0.6)]),
            r"accuracy 63\.3 is out of range",
        ),
    ],
)
def test_undefined_metrics_are_errors(compute, message):
    with pytest.raises(VlkrError, match=message):
        compute()


def logit(p):
    return math.log(p / (1 - p))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


LINE = [(0.1, 0.1), (0.7, 0.4)]


@pytest.mark.parametrize(
    ("point", "reference", "expected"),
    [
        (LINE[0], LINE, 0),
        (LINE[1], LINE, 0),
        pytest.param(
            (
                sigmoid((logit(0.1) + logit(0.7)) / 2),
                sigmoid((logit(0.1) + logit(0.4)) / 2) + 0.05,
            ),
            LINE,
            0.05,
            id="above the middle of the line",
        ),
        pytest.param((1.0, 1.0), [(0.1, 0.1), (1.0, 1.0)], 0.001, id="clipped at 99.9 %"),
        pytest.param((0.0, 0.0), [(0.1, 0.1), (0.9, 0.9)], -0.001, id="clipped at 0.1 %"),
        # A line through two points that are nearly above each other is steep: it ends at 0 or 1.
        ((0.95, 0.5), [(0.7, 0.6), (0.7002, 0.4)], 0.5),
        ((0.95, 0.5), [(0.7, 0.4), (0.7002, 0.6)], -0.5),
    ],
)
def test_effective_robustness_against_the_line_of_two_points(point, reference, expected):
    assert effective_robustness(*point, reference) == pytest.approx(expected, abs=1e-6)


def test_effective_robustness_against_a_least_squares_line():
    reference = [(0.5, 0.3), (0.6, 0.45), (0.7, 0.5), (0.85, 0.7)]
    x, y = (np.array([logit(point[axis]) for point in reference]) for axis in (0, 1))
    slope, intercept = np.linalg.lstsq(np.stack([x, np.ones(4)], 1), y, rcond=None)[0]
    expected = 0.6 - sigmoid(slope * logit(0.8) + intercept)
    assert effective_robustness(0.8, 0.6, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("base", "new", "mean"), [(0.8, 0.6, 2 * 0.8 * 0.6 / 1.4), (0.9, 0.0, 0), (0.0, 0.0, 0)]
)
def test_harmonic_mean_of_base_and_new(base, new, mean):
    expected = {"base": base, "new": new, "harmonic_mean": round(mean, 6)}
    assert base_to_new(base, new) == expected


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
