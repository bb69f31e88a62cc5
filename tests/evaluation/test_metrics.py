import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from vlkr.evaluation.metrics import classification_metrics


def compute(logits, labels, batches=1):
    metrics = classification_metrics(logits.shape[1])
    for part, answers in zip(logits.chunk(batches), labels.chunk(batches), strict=True):
        metrics.update(part, answers)
    return {name: value.item() for name, value in metrics.compute().items()}


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


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@pytest.mark.parametrize("num_classes", [2, 3, 10, 200])
@pytest.mark.parametrize("sharpness", [0.1, 3.0])
@pytest.mark.parametrize("batches", [1, 7])
def test_random_logits_against_scikit_learn(num_classes, sharpness, batches):
    logits = sharpness * torch.randn(500, num_classes)
    labels = torch.randint(num_classes, (500,))
    labels[:100] = logits[:100].argmax(1)
    values = compute(logits, labels, batches)
    y, scores = labels.numpy(), logits.numpy()
    assert values["acc1"] == pytest.approx(accuracy_score(y, scores.argmax(1)))
    recall = balanced_accuracy_score(y, scores.argmax(1))
    assert values["mean_per_class_recall"] == pytest.approx(recall)
    if num_classes > 5:
        top5 = top_k_accuracy_score(y, scores, k=5, labels=range(num_classes))
        assert values["acc5"] == pytest.approx(top5)
    else:
        assert values["acc5"] == 1
    probabilities = logits.double().softmax(1).numpy()
    assert values["ece"] == pytest.approx(expected_calibration_error(probabilities, y), abs=1e-5)


def test_one_class_among_the_labels():
    logits = torch.randn(50, 10)
    logits[:20, 3] = 10
    labels = torch.full((50,), 3)
    values = compute(logits, labels)
    accuracy = (logits.argmax(1) == 3).double().mean().item()
    assert values["acc1"] == pytest.approx(accuracy)
    assert values["mean_per_class_recall"] == pytest.approx(accuracy)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
def test_class_that_is_absent_from_the_labels():
    logits, labels = torch.randn(300, 6), torch.randint(5, (300,))
    values = compute(logits, labels)
    recall = balanced_accuracy_score(labels.numpy(), logits.argmax(1).numpy())
    assert values["mean_per_class_recall"] == pytest.approx(recall)


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


def test_right_and_wrong_with_certainty():
    labels = torch.arange(6).repeat(3)
    right = compute(100 * torch.eye(6)[labels], labels)
    assert right == {"acc1": 1, "acc5": 1, "mean_per_class_recall": 1, "ece": 0}
    wrong = compute(100 * torch.eye(6)[(labels + 1) % 6], labels)
    assert (wrong["acc1"], wrong["mean_per_class_recall"], wrong["ece"]) == (0, 0, 1)


def test_imbalance_weighs_images_in_accuracy_and_classes_in_recall():
    logits = torch.eye(2)[torch.zeros(10, dtype=torch.long)]  # always class 0
    labels = torch.tensor([0] * 9 + [1])
    values = compute(logits, labels)
    assert values["acc1"] == pytest.approx(0.9)
    assert values["mean_per_class_recall"] == pytest.approx(0.5)


def test_bf16_logits_are_calibrated_in_fp32():
    logits, labels = torch.randn(200, 5).bfloat16(), torch.randint(5, (200,))
    probabilities = logits.double().softmax(1).numpy()
    expected = expected_calibration_error(probabilities, labels.numpy())
    assert compute(logits, labels)["ece"] == pytest.approx(expected, abs=1e-5)
    assert np.isfinite(expected)
