"""Effective robustness of an evaluation against zero-shot evaluations on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlkr.datasets import Dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.metrics import effective_robustness
from vlkr.evaluation.report import Evaluation
from vlkr.files import read_json


class Reference:
    """Top-1 accuracies of a zero-shot model, read from disk.

    Args:
        path: ``metrics.json`` of ``vlkr evaluate``, or the folder that holds it.

    Attributes:
        label: the model's name and its weights' hash.

    Raises:
        VlkrError: if there is no such evaluation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / "metrics.json" if path.is_dir() else path
        found = read_json(self.path)
        try:
            self.label = f"{found['model']} ({found['weights_sha256'][:12]})"
            self._acc1 = {
                (result["dataset"], result["split"]): float(result["metrics"]["acc1"])
                for result in found["results"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise VlkrError(f"{self.path} is no evaluation of a model: {error}") from error
        if "adapter" in found:
            raise VlkrError(f"{self.path} is of an adapted model, expected a zero-shot one")

    def accuracy(self, dataset: str, split: str) -> float:
        """On a dataset's split.

        Raises:
            VlkrError: if it was not measured there.
        """
        if (dataset, split) not in self._acc1:
            raise VlkrError(f"{self.path} has no result on dataset {dataset!r}, split {split!r}")
        return self._acc1[dataset, split]


def check_references(
    references: Sequence[Reference], datasets: Sequence[Dataset], split: str
) -> None:
    """Raises :class:`VlkrError` unless there is a shift, and the references cover all datasets."""
    if len(datasets) < 2:
        raise VlkrError("effective robustness needs a shift, and there is the home dataset alone")
    for reference in references:
        for dataset in datasets:
            reference.accuracy(dataset.name, split)


def add_effective_robustness(evaluation: Evaluation, references: Sequence[Reference]) -> None:
    """Adds ``effective_robustness`` to each shift's metrics, and the references to the context.

    With a single zero-shot model the line runs from chance to it.
    """
    home = evaluation.home
    for shift in evaluation.shifts:
        points = [
            tuple(model.accuracy(r.dataset, r.split) for r in (home, shift)) for model in references
        ]
        if len(points) == 1:
            points.append((1 / len(home.class_names), 1 / len(shift.class_names)))
        shift.metrics["effective_robustness"] = effective_robustness(
            home.metrics["acc1"], shift.metrics["acc1"], [(x, y) for x, y in points]
        )
    names = [model.label for model in references] + ["chance"] * (len(references) == 1)
    evaluation.context["effective robustness against"] = " and ".join(names)
