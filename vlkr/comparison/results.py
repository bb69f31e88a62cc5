"""The results of a grid: read from its cells' folders, with settings chosen on validation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vlkr.comparison.plan import Candidate, Cell, Entry, Place, Plan, Reading
from vlkr.errors import VlkrError
from vlkr.files import differences, read_json, write_json


@dataclass(frozen=True)
class CellFolder:
    """The folder of a cell: the one place that knows its files.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def of(cls, output: Path, cell_id: str) -> CellFolder:
        """Returns the folder of a cell below the folder of its grid."""
        return cls(output / "cells" / cell_id)

    @property
    def config(self) -> Path:
        """The cell and its hash."""
        return self.path / "cell.json"

    @property
    def result(self) -> Path:
        """Metrics and costs, written last."""
        return self.path / "result.json"

    @property
    def error(self) -> Path:
        """Why the cell failed; in place of the result."""
        return self.path / "error.json"

    @property
    def predictions(self) -> Path:
        """Labels, predictions and confidences by set."""
        return self.path / "predictions.safetensors"

    @property
    def run(self) -> Path:
        """The run folder of an adapter's training."""
        return self.path / "run"

    @property
    def state(self) -> str:
        """``finished``, ``failed: ...`` or ``not finished``."""
        if self.result.is_file():
            return "finished"
        if self.error.is_file():
            return f"failed: {read_json(self.error)['message']}"
        return "not finished"

    def is_finished(self, cell: Cell) -> bool:
        """Whether the folder holds this cell's result.

        Raises:
            VlkrError: if it holds that of a different configuration.
        """
        if not self.result.is_file():
            return False
        if read_json(self.result).get("hash") == cell.hash:
            return True
        changes = differences(read_json(self.config)["cell"], cell.to_json())
        raise VlkrError(
            f"{self.path} holds a result of another configuration "
            f"({'; '.join(sorted(changes.values()))}); name another folder, or --force computes "
            "such cells again"
        )

    def fail(self, kind: str, message: str, details: str = "") -> None:
        """Records that the cell failed."""
        write_json(self.error, {"type": kind, "message": message, "traceback": details})


@dataclass(frozen=True)
class CellPredictions:
    """Predictions of one cell on one set, sorted by the images' keys.

    Attributes:
        keys: hash of the images' keys.
        labels: ``(num_images)``.
        predicted: ``(num_images)``.
        confidence: ``(num_images)``.
    """

    keys: str
    labels: NDArray[np.int32]
    predicted: NDArray[np.int32]
    confidence: NDArray[np.float32]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is correct, ``(num_images)``."""
        correct: NDArray[np.bool_] = self.predicted == self.labels
        return correct


@dataclass(frozen=True)
class CellResult:
    """A finished cell.

    Attributes:
        cell: what was computed.
        folder: its folder.
        record: content of its ``result.json``.
    """

    cell: Cell
    folder: CellFolder
    record: dict[str, Any]

    @cached_property
    def sets(self) -> dict[str, dict[str, Any]]:
        """Results by set, in CLIP_benchmark's form."""
        return {result["dataset"]: result for result in self.record["results"]}

    def metric(self, set_name: str, metric: str = "acc1") -> float:
        """Returns a metric on a set."""
        value: float = self.sets[set_name]["metrics"][metric]
        return value

    def predictions(self, set_name: str) -> CellPredictions:
        """Reads the predictions on a set; raises :class:`VlkrError` if they cannot be read."""
        path = self.folder.predictions
        columns = (f"{set_name}.{name}" for name in ("labels", "predicted", "confidence"))
        try:
            with safe_open(path, "np") as file:
                keys = json.loads((file.metadata() or {})["keys"])[set_name]
                return CellPredictions(keys, *map(file.get_tensor, columns))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise VlkrError(
                f"cannot read {path}: {error}; without its folder the cell is computed again"
            ) from error


@dataclass(frozen=True)
class SelectedRuns:
    """An entry of the tables with the cells of the setting that validation chose.

    Attributes:
        entry: as planned.
        chosen: the setting, None if no cell of any setting is finished.
        results: of the chosen setting, one per seed; fewer where cells failed.
        scores: mean validation accuracy by candidate, None where it is not known.
    """

    entry: Entry
    chosen: Candidate | None
    results: list[CellResult]
    scores: list[float | None] = field(default_factory=list)

    @property
    def seeds(self) -> list[int | None]:
        """Seeds of the results."""
        return [result.cell.seed for result in self.results]

    def values(self, set_name: str, metric: str = "acc1") -> list[float]:
        """Returns a metric on a set, one value per seed."""
        return [result.metric(set_name, metric) for result in self.results]

    def first_set(self) -> list[float]:
        """Returns top-1 accuracy on the first set, one value per seed."""
        return self.values(self.entry.sets[0])

    def shift_means(self) -> list[float]:
        """Returns mean top-1 accuracy over the sets after the first, one value per seed."""
        return [statistics.mean(map(r.metric, self.entry.sets[1:])) for r in self.results]

    def worst_shifts(self) -> list[float]:
        """Returns top-1 accuracy on the worst set after the first, one value per seed."""
        return [min(map(r.metric, self.entry.sets[1:])) for r in self.results]


@dataclass(frozen=True)
class GridResults:
    """All that is finished of a plan, and what is missing.

    Attributes:
        plan: of the grid.
        selected: one per entry, in their order.
        failures: message by cell.
        unfinished: cells without result or error.
        cells: results of all finished cells, by id.
    """

    plan: Plan
    selected: list[SelectedRuns]
    failures: dict[str, str]
    unfinished: list[str]
    cells: dict[str, CellResult]

    @property
    def methods(self) -> list[str]:
        """Labels, in the order of the plan."""
        return list(dict.fromkeys(runs.entry.method for runs in self.selected))

    def of_method(self, method: str) -> list[SelectedRuns]:
        """Returns the entries of a method."""
        return [runs for runs in self.selected if runs.entry.method == method]

    def at(self, method: str, place: Place) -> SelectedRuns | None:
        """Returns a method's finished entry in a place, or that which holds for every place."""
        for runs in self.of_method(method):
            if runs.results and runs.entry.place.items() <= place.items():
                return runs
        return None

    def values(self, method: str, place: Place, set_name: str) -> list[float]:
        """Returns top-1 accuracy on a set in a place, one value per seed; empty if unknown."""
        runs = self.at(method, place)
        return runs.values(set_name) if runs else []

    def context(self) -> dict[str, Any]:
        """Returns the plan's context with what only results tell: weights and templates."""
        first = next(iter(self.cells.values())).record
        templates = {
            result["templates"] for cell in self.cells.values() for result in cell.sets.values()
        }
        rest = {key: value for key, value in self.plan.context.items() if key != "model"}
        return {
            "model": self.plan.context["model"],
            "weights": first["weights_sha256"][:12],
            **rest,
            "templates": "; ".join(sorted(templates)),
        }


def read_results(plan: Plan, output: Path) -> GridResults:
    """Reads the finished cells and chooses settings by their validation accuracy.

    A setting counts if all its seeds are finished; where none is, the one with the most. Of equal
    ones the first wins, so settings are best given from small to large.

    Raises:
        VlkrError: if no cell is finished, or cells were computed with different weights.
    """
    cells: dict[str, CellResult] = {}
    failures: dict[str, str] = {}
    unfinished = []
    for cell in plan.cells:
        folder = CellFolder.of(output, cell.id)
        if folder.result.is_file():
            cells[cell.id] = CellResult(cell, folder, read_json(folder.result))
        elif folder.error.is_file():
            error = read_json(folder.error)
            failures[cell.id] = f"{error['type']}: {error['message']}"
        else:
            unfinished.append(cell.id)
    if not cells:
        if failures:
            name, message = next(iter(failures.items()))
            raise VlkrError(f"every cell failed; the first is {name}: {message}")
        raise VlkrError(
            f"none of {len(unfinished)} cells is finished yet; once some are, the same command "
            "with --jobs 0 reports them"
        )
    hashes = {cell.record["weights_sha256"] for cell in cells.values()}
    if len(hashes) > 1:
        raise VlkrError(
            f"{output} holds cells of models with different weights "
            f"({', '.join(sorted(hashes))}); name another folder"
        )
    selected = [select_runs(entry, cells) for entry in plan.entries]
    return GridResults(plan, selected, failures, unfinished, cells)


def select_runs(entry: Entry, cells: dict[str, CellResult]) -> SelectedRuns:
    """Chooses the setting of an entry by mean validation accuracy; of equal ones the first.

    Args:
        entry: with its candidates.
        cells: finished cells by id.
    """
    scores = [_mean_reading(candidate.readings, cells) for candidate in entry.candidates]
    finished = [sum(cell in cells for cell in candidate.cells) for candidate in entry.candidates]
    most = max(finished)
    if most == 0:
        return SelectedRuns(entry, None, [], scores)
    complete = [i for i, number in enumerate(finished) if number == most]
    best = max(complete, key=lambda i: scores[i] or 0.0)  # the first of equal ones
    chosen = entry.candidates[best]
    return SelectedRuns(entry, chosen, [cells[i] for i in chosen.cells if i in cells], scores)


def _mean_reading(readings: Sequence[Reading], cells: dict[str, CellResult]) -> float | None:
    """The mean reading; of a set with several domains each domain counts the same."""
    values: list[float | None] = []
    for reading in readings:
        if reading.cell not in cells:
            continue
        result = cells[reading.cell]
        if reading.set is None:
            values.append(result.record["val_acc1"])
        else:
            metrics = result.sets[reading.set]["metrics"]
            values.append(metrics.get("mean_domain_acc1", metrics["acc1"]))
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None
