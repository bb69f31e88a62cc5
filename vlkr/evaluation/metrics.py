from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)


class MeanPerClassRecall(MulticlassConfusionMatrix):
    """Recall averaged over the classes that occur among the labels (CLIP_benchmark's metric).

    torchmetrics' macro average also counts a class that only occurs among the predictions.
    """

    def compute(self) -> Tensor:
        """A scalar in [0, 1]."""
        confusion = super().compute().double()
        support = confusion.sum(1)
        present = support > 0
        return (confusion.diagonal()[present] / support[present]).mean()


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error with 15 bins (Guo et al., 2017); takes logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, n_bins=15, norm="l1")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch of logits ``(batch, num_classes)`` and labels ``(batch)``."""
        super().update(preds.float().softmax(-1), target)


def classification_metrics(num_classes: int) -> MetricCollection:
    """``acc1``, ``acc5``, ``mean_per_class_recall`` and ``ece``, each in [0, 1], from logits.

    With at most five classes ``acc5`` is 1.

    >>> import torch
    >>> metrics = classification_metrics(3)
    >>> metrics.update(torch.eye(3), torch.tensor([0, 1, 1]))
    >>> round(metrics.compute()["acc1"].item(), 4)
    0.6667
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "acc1": MulticlassAccuracy(num_classes=num_classes, average="micro"),
        "acc5": MulticlassAccuracy(
            num_classes=num_classes, average="micro", top_k=min(5, num_classes)
        ),
        "mean_per_class_recall": MeanPerClassRecall(num_classes=num_classes),
        "ece": CalibrationError(num_classes),
    }
    return MetricCollection(metrics, compute_groups=False)
