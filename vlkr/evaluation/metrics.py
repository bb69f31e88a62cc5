"""Computes classification metrics, identically for one process or several.

Every value is a fraction in [0, 1], except for the negative log-likelihood (nats) and effective
robustness (a difference of fractions). An undefined value is an error or is omitted, never NaN.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_calibration_error,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from vlkr.datasets import Dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.predictions import Predictions

BINS = 15
_CLIP = 1e-3
# torchmetrics puts a confidence of exactly 1 into a separate bin.
_BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Confused:
    """A confusion of two classes: number and fraction of the label's images."""

    label: str
    predicted: str
    images: int
    fraction: float


@dataclass(frozen=True)
class DomainAccuracy:
    """The number of images and the top-1 accuracy of one domain."""

    images: int
    acc1: float


@dataclass(frozen=True)
class ReliabilityBin:
    """The images with a confidence in ``[lower, upper)``; the last bin includes ``upper``.

    Attributes:
        lower: edge.
        upper: edge.
        images: number of images, at least 1.
        confidence: mean confidence.
        accuracy: fraction predicted correctly.
    """

    lower: float
    upper: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class DatasetResult:
    """The metrics of one split of a dataset.

    Attributes:
        dataset: name.
        split: name.
        images: number of images.
        templates: name of the template set.
        metrics: by name; fractions in [0, 1], and ``nll`` in nats.
        domains: number of images and top-1 accuracy by domain, where the data has domains.
        reliability: bins of the reliability diagram.
        worst_confusions: the most frequent confusions.
        class_names: by label.
        confusion: counts, rows are labels.
        predictions: per-image predictions, if they were kept.
    """

    dataset: str
    split: str
    images: int
    templates: str
    metrics: dict[str, float]
    domains: dict[str, DomainAccuracy] = field(default_factory=dict)
    reliability: list[ReliabilityBin] = field(default_factory=list)
    worst_confusions: list[Confused] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    confusion: list[list[int]] = field(default_factory=list, repr=False)
    predictions: Predictions | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Returns the result in CLIP_benchmark's form, but for the model's name."""
        details = {
            "domains": {name: asdict(domain) for name, domain in self.domains.items()},
            "reliability": [asdict(part) for part in self.reliability],
            "worst_confusions": [asdict(pair) for pair in self.worst_confusions],
        }
        return {
            "task": "zeroshot_classification",
            "split": self.split,
            "images": self.images,
            "templates": self.templates,
            "metrics": self.metrics,
            "language": "en",
            **{name: value for name, value in details.items() if value},
        }


def measure(
    predictions: Predictions, dataset: Dataset, split: str = "test", *, keep: bool = False
) -> DatasetResult:
    """Computes every metric of the predictions on a split of a dataset.

    Args:
        predictions: of all images of the split.
        dataset: its class names, domains and templates are used.
        split: name.
        keep: keep the predictions in the result.
    """
    num_classes = len(dataset.class_names)
    metrics = classification_metrics(predictions, num_classes)
    confusion = confusion_matrix(predictions, num_classes)
    domains = domain_accuracy(predictions, dataset.domains) if dataset.domains else {}
    if len(domains) > 1:
        accuracies = [domain.acc1 for domain in domains.values()]
        metrics["mean_domain_acc1"] = round(sum(accuracies) / len(accuracies), 6)
        metrics["worst_domain_acc1"] = min(accuracies)
    return DatasetResult(
        dataset.name,
        split,
        len(predictions),
        dataset.template_set,
        metrics,
        domains,
        reliability(predictions),
        worst_confusions(confusion, dataset.class_names),
        dataset.class_names,
        confusion.tolist(),
        predictions if keep else None,
    )


def classification_metrics(predictions: Predictions, num_classes: int) -> dict[str, float]:
    """Returns the metrics of a split, rounded to six digits.

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
    """Returns counts ``(num_classes, num_classes)``: rows are labels, columns predictions."""
    predicted, labels = torch.tensor(predictions.predicted), torch.tensor(predictions.labels)
    counts: Tensor = multiclass_confusion_matrix(predicted, labels, num_classes)
    return counts


def worst_confusions(
    confusion: Tensor, class_names: Sequence[str], number: int = 5
) -> list[Confused]:
    """Returns the pairs of classes that are confused most often, the worst first.

    Args:
        confusion: counts, rows are labels.
        class_names: by label.
        number: largest number of pairs.
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
    """Returns the bins of the reliability diagram that are not empty, by confidence.

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
    """Returns the top-1 accuracy of each domain.

    Args:
        predictions: with their domains.
        domains: each must have an image.

    Raises:
        VlkrError: for a domain without images, or an image of an unknown domain.
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


def open_set_auroc(known: Predictions, unknown: Predictions) -> float:
    """Returns how well the maximum softmax probability separates known from unknown classes.

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
    in_distribution: float, shift: float, reference: Sequence[tuple[float, float]]
) -> float:
    """Returns the accuracy under shift beyond that of equally accurate reference models.

    ``shift - b(in_distribution)`` with ``b`` a line fitted by least squares to the reference
    accuracies on logit axes (Taori et al., 2020, arXiv 2007.00644, section 2; the references here
    are zero-shot models). Of two points it is the line through both. With a single zero-shot
    model take chance as the second, ``(1 / num_classes, 1 / num_classes)``. Accuracies are
    clipped to 0.1 and 99.9 %, where the logit is finite.

    Args:
        in_distribution: the model's top-1 accuracy on the in-distribution test set.
        shift: its top-1 accuracy under shift.
        reference: both accuracies of two reference models or more.

    Raises:
        VlkrError: for accuracies outside [0, 1], or references without a slope.
    """
    points = [(in_distribution, shift), *reference]
    for value in (value for point in points for value in point):
        if not 0 <= value <= 1:
            raise VlkrError(f"accuracy {value} is out of range, expected 0 to 1")
    x, y = ([_logit(point[axis]) for point in reference] for axis in (0, 1))
    if len(set(x)) < 2:
        raise VlkrError(
            "cannot fit a robustness baseline: need two different in-distribution accuracies, got "
            f"{[point[0] for point in reference]}"
        )
    slope, intercept = statistics.linear_regression(x, y)
    expected = 0.5 * (1 + math.tanh((intercept + slope * _logit(in_distribution)) / 2))
    return round(shift - expected, 6)


def base_to_new(base: float, new: float) -> dict[str, float]:
    """Returns both accuracies and their harmonic mean (Zhou et al., 2022, CoCoOp).

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
