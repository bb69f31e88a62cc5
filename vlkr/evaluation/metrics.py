"""Metrics of classification, from predictions sorted by key: the same sums on one process or many.

Every value is a fraction in [0, 1] but for the negative log-likelihood (nats) and effective
robustness (a difference of fractions). What is not defined is an error or is left out, never NaN.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_calibration_error,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from vlkr.errors import VlkrError
from vlkr.evaluation.predictions import Predictions
from vlkr.evaluation.report import ReliabilityBin

BINS = 15
_CLIP = 1e-3
# torchmetrics opens a bin of its own for a confidence of exactly 1.
_BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Confused:
    """A class that is taken for another.

    Attributes:
        label: the true class.
        predicted: the class it is taken for.
        images: how often.
        fraction: of the true class's images.
    """

    label: str
    predicted: str
    images: int
    fraction: float


@dataclass(frozen=True)
class DomainAccuracy:
    """One domain's number of images and top-1 accuracy."""

    images: int
    acc1: float


def classification_metrics(predictions: Predictions, num_classes: int) -> dict[str, float]:
    """The metrics of a split, rounded to six digits.

    ``acc1`` and ``acc5`` (1 with at most five classes), ``mean_per_class_recall`` over the classes
    among the labels (CLIP_benchmark's), ``f1`` (macro, over the classes among labels and
    predictions), ``ece`` (expected calibration error, 15 equal bins, Guo et al., 2017, equation
    3) and ``nll`` (mean negative log-likelihood).

    Raises:
        VlkrError: if there are no predictions.
    """
    _not_empty(predictions)
    predicted, labels = torch.tensor(predictions.predicted), torch.tensor(predictions.labels)
    confusion = confusion_matrix(predictions, num_classes).double()
    support = confusion.sum(1)
    recall = confusion.diagonal()[support > 0] / support[support > 0]
    confidence = torch.tensor(predictions.confidence, dtype=torch.float64).clamp(max=_BELOW_ONE)
    values = {
        "acc1": multiclass_accuracy(predicted, labels, num_classes, average="micro"),
        "acc5": torch.tensor(predictions.in_top5).double().mean(),
        "mean_per_class_recall": recall.mean(),
        "f1": multiclass_f1_score(predicted, labels, num_classes, average="macro"),
        "ece": binary_calibration_error(confidence, predicted == labels, n_bins=BINS, norm="l1"),
        "nll": torch.tensor(predictions.nll, dtype=torch.float64).mean(),
    }
    return {name: round(value.item(), 6) for name, value in values.items()}


def confusion_matrix(predictions: Predictions, num_classes: int) -> Tensor:
    """Counts ``(num_classes, num_classes)``: rows are labels, columns predictions."""
    predicted, labels = torch.tensor(predictions.predicted), torch.tensor(predictions.labels)
    counts: Tensor = multiclass_confusion_matrix(predicted, labels, num_classes)
    return counts


def worst_confusions(
    confusion: Tensor, class_names: Sequence[str], number: int = 5
) -> list[Confused]:
    """The pairs of classes that are confused most often, the worst first.

    Args:
        confusion: counts, rows are labels.
        class_names: by label.
        number: at most so many.
    """
    wrong = confusion.clone().fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:number].tolist()
    support = confusion.sum(1).tolist()
    pairs = [divmod(index, len(class_names)) for index in order]
    counts = {(i, j): int(wrong[i, j]) for i, j in pairs if wrong[i, j] > 0}
    return [
        Confused(class_names[i], class_names[j], count, round(count / support[i], 6))
        for (i, j), count in counts.items()
    ]


def reliability(predictions: Predictions) -> list[ReliabilityBin]:
    """The bins of the reliability diagram that hold an image, by confidence.

    The expected calibration error is the mean of ``|accuracy - confidence|`` weighted by images.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    confidence = torch.tensor(predictions.confidence, dtype=torch.float64)
    correct = torch.tensor(predictions.predicted) == torch.tensor(predictions.labels)
    index = torch.bucketize(confidence.clamp(max=_BELOW_ONE), edges, right=True) - 1
    bins = []
    for i in range(BINS):
        inside = index == i
        if inside.any():
            bins.append(
                ReliabilityBin(
                    round(edges[i].item(), 6),
                    round(edges[i + 1].item(), 6),
                    int(inside.sum()),
                    round(confidence[inside].mean().item(), 6),
                    round(correct[inside].double().mean().item(), 6),
                )
            )
    return bins


def domain_accuracy(predictions: Predictions, domains: Sequence[str]) -> dict[str, DomainAccuracy]:
    """Top-1 accuracy by domain.

    Args:
        predictions: with their domains.
        domains: each must have an image.

    Raises:
        VlkrError: for a domain without images, or an image of another domain or of none.
    """
    known = ", ".join(domains)
    hits: dict[str, list[bool]] = {domain: [] for domain in domains}
    rows = zip(
        predictions.keys,
        predictions.domains,
        predictions.predicted,
        predictions.labels,
        strict=True,
    )
    for key, domain, predicted, label in rows:
        if domain is None or domain not in hits:
            raise VlkrError(f"sample {key!r} is of domain {domain!r}, expected one of {known}")
        hits[domain].append(predicted == label)
    for domain, found in hits.items():
        if not found:
            raise VlkrError(f"domain {domain!r} is empty: there is no image of it to measure")
    return {
        domain: DomainAccuracy(len(found), round(sum(found) / len(found), 6))
        for domain, found in hits.items()
    }


def unknown_auroc(known: Predictions, unknown: Predictions) -> float:
    """How well the maximum softmax probability tells known from unknown classes.

    The area under the receiver operating characteristic (Hendrycks and Gimpel, 2017, arXiv
    1610.02136): the chance that an image of a known class has the larger confidence, ties
    counted half.

    Raises:
        VlkrError: if either is empty.
    """
    _not_empty(known)
    _not_empty(unknown)
    confidence = torch.tensor(known.confidence + unknown.confidence, dtype=torch.float64)
    target = torch.tensor([1] * len(known) + [0] * len(unknown))
    return round(float(binary_auroc(confidence, target)), 6)


def effective_robustness(
    home: float, shift: float, reference: Sequence[tuple[float, float]]
) -> float:
    """Accuracy under shift beyond what models of reference have at the same accuracy at home.

    ``shift - b(home)`` with ``b`` a line fitted by least squares to the accuracies of reference
    on logit axes (Taori et al., 2020, arXiv 2007.00644, section 2; the reference here are
    zero-shot models). Of two points it is the line through both. With a single zero-shot model
    take chance as the second, ``(1 / num_classes, 1 / num_classes)``. Accuracies are kept
    within 0.1 and 99.9 %, where the logit is finite.

    Args:
        home: the model's top-1 accuracy on the home test set.
        shift: likewise under shift.
        reference: accuracies at home and under that shift, of two models or more.

    Raises:
        VlkrError: for accuracies outside [0, 1], or a reference without a slope.
    """
    points = [(home, shift), *reference]
    for value in (value for point in points for value in point):
        if not 0 <= value <= 1:
            raise VlkrError(f"accuracy {value} is out of range, expected 0 to 1")
    x, y = ([_logit(point[axis]) for point in reference] for axis in (0, 1))
    if len(set(x)) < 2:
        raise VlkrError(
            f"models of reference with accuracies at home {[point[0] for point in reference]} make "
            "no line, expected two accuracies or more"
        )
    slope, intercept = statistics.linear_regression(x, y)
    expected = 0.5 * (1 + math.tanh((intercept + slope * _logit(home)) / 2))  # the sigmoid
    return round(shift - expected, 6)


def base_to_new(base: float, new: float) -> dict[str, float]:
    """Accuracies on base and on new classes, and their harmonic mean (Zhou et al., 2022, CoCoOp).

    >>> base_to_new(0.8, 0.6)["harmonic_mean"]
    0.685714
    """
    mean = statistics.harmonic_mean([base, new])
    return {"base": base, "new": new, "harmonic_mean": round(mean, 6)}


def _logit(accuracy: float) -> float:
    p = min(max(accuracy, _CLIP), 1 - _CLIP)
    return math.log(p / (1 - p))


def _not_empty(predictions: Predictions) -> None:
    if not len(predictions):
        raise VlkrError("there are no predictions to measure")
