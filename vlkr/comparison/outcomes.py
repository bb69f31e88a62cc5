"""What a grid found: results read from the cells' folders, and settings chosen on validation."""

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

from vlkr.comparison.engine import cell_folder
from vlkr.comparison.plan import Candidate, Cell, Entry, Plan, Reading
from vlkr.comparison.results import ERROR, PREDICTIONS, RESULT
from vlkr.errors import VlkrError
from vlkr.files import read_json


@dataclass(frozen=True)
class Said:
    """What a cell says of the images of a set, sorted by their keys.

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
        """Where it is right, ``(num_images)``."""
        correct: NDArray[np.bool_] = self.predicted == self.labels
        return correct


@dataclass(frozen=True)
class Result:
    """A finished cell.

    Attributes:
        cell: what was computed.
        folder: where.
        found: its ``result.json``.
    """

    cell: Cell
    folder: Path
    found: dict[str, Any]

    @cached_property
    def sets(self) -> dict[str, dict[str, Any]]:
        """Results by set, in CLIP_benchmark's form."""
        return {result["dataset"]: result for result in self.found["results"]}

    def metric(self, name: str, metric: str = "acc1") -> float:
        """A metric on a set."""
        value: float = self.sets[name]["metrics"][metric]
        return value

    def said(self, name: str) -> Said:
        """Predictions on a set.

        Raises:
            VlkrError: if they cannot be read.
        """
        path = self.folder / PREDICTIONS
        try:
            with safe_open(path, "np") as file:
                columns = [
                    file.get_tensor(f"{name}.{c}") for c in ("labels", "predicted", "confidence")
                ]
                return Said(json.loads((file.metadata() or {})["keys"])[name], *columns)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise VlkrError(
                f"cannot read {path}: {error}; without its folder the cell is computed again"
            ) from error


@dataclass
class Outcome:
    """An entry of the tables with the setting that validation chose.

    Attributes:
        entry: what was planned.
        chosen: the setting, None if no cell of any setting is finished.
        results: of the chosen setting, one a seed; fewer where cells failed.
        scores: mean validation accuracy by candidate, None where it is not known.
    """

    entry: Entry
    chosen: Candidate | None
    results: list[Result]
    scores: list[float | None] = field(default_factory=list)

    def values(self, name: str, metric: str = "acc1") -> list[float]:
        """A metric on a set, one a seed."""
        return [result.metric(name, metric) for result in self.results]

    def shift_means(self, metric: str = "acc1") -> list[float]:
        """The mean over the sets after the first, one a seed."""
        return [
            statistics.mean(result.metric(name, metric) for name in self.entry.sets[1:])
            for result in self.results
        ]

    def worst_shifts(self) -> list[float]:
        """Top-1 accuracy on the worst of the sets after the first, one a seed."""
        return [min(result.metric(name) for name in self.entry.sets[1:]) for result in self.results]

    @property
    def seeds(self) -> list[int | None]:
        """Of the results."""
        return [result.cell.seed for result in self.results]


@dataclass
class Collected:
    """All outcomes of a plan, and what is missing.

    Attributes:
        plan: of the grid.
        outcomes: one an entry, in their order.
        failures: message by cell.
        unfinished: cells without result or error.
        results: of all finished cells, by id.
    """

    plan: Plan
    outcomes: list[Outcome]
    failures: dict[str, str]
    unfinished: list[str]
    results: dict[str, Result]

    def at(self, method: str, place: dict[str, Any]) -> Outcome | None:
        """The finished outcome of a method in a place, or the one that stands for every place."""
        for outcome in self.outcomes:
            entry = outcome.entry
            if entry.method == method and outcome.results and entry.place.items() <= place.items():
                return outcome
        return None

    def has(self, place: dict[str, Any]) -> bool:
        """Whether any method has a result in a place."""
        return any(self.at(method, place) is not None for method in self.methods)

    @property
    def methods(self) -> list[str]:
        """Labels, in the order of the plan."""
        return list(dict.fromkeys(outcome.entry.method for outcome in self.outcomes))


def collect(plan: Plan, output: Path) -> Collected:
    """Reads the finished cells and chooses settings by their validation accuracy.

    A setting counts if all its seeds are finished; where none is, the one with the most. Of equal
    ones the first wins, so settings are best given from small to large.

    Raises:
        VlkrError: if no cell is finished, or cells were computed with other weights.
    """
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    for cell in plan.cells:
        folder = cell_folder(output, cell.id)
        if (folder / RESULT).is_file():
            results[cell.id] = Result(cell, folder, read_json(folder / RESULT))
        elif (folder / ERROR).is_file():
            found = read_json(folder / ERROR)
            failures[cell.id] = f"{found['type']}: {found['message']}"
    unfinished = [c.id for c in plan.cells if c.id not in results and c.id not in failures]
    if not results:
        if failures:
            name, message = next(iter(failures.items()))
            raise VlkrError(f"every cell failed; the first is {name}: {message}")
        raise VlkrError(
            f"none of {len(unfinished)} cells is finished yet; once some are, the same command "
            "with --jobs 0 reports them"
        )
    hashes = {result.found["weights_sha256"] for result in results.values()}
    if len(hashes) > 1:
        raise VlkrError(
            f"{output} holds cells of models with other weights ({', '.join(sorted(hashes))}); "
            "name another folder"
        )
    outcomes = [_choose(entry, results) for entry in plan.entries]
    return Collected(plan, outcomes, failures, unfinished, results)


def _choose(entry: Entry, results: dict[str, Result]) -> Outcome:
    scores = [_score(candidate.readings, results) for candidate in entry.candidates]
    done = [sum(cell in results for cell in candidate.cells) for candidate in entry.candidates]
    best: int | None = None
    for i, score in enumerate(scores):
        if done[i] and done[i] == max(done):
            better = best is None or (score is not None and score > (scores[best] or 0.0))
            best = i if better else best
    if best is None:
        return Outcome(entry, None, [], scores)
    chosen = entry.candidates[best]
    found = [results[cell] for cell in chosen.cells if cell in results]
    return Outcome(entry, chosen, found, scores)


def _score(readings: Sequence[Reading], results: dict[str, Result]) -> float | None:
    """The mean reading; of a set with several domains each domain counts the same."""
    values: list[float | None] = []
    for reading in readings:
        if reading.cell in results:
            result = results[reading.cell]
            if reading.set is None:
                values.append(result.found["val_acc1"])
            else:
                metrics = result.sets[reading.set]["metrics"]
                values.append(metrics.get("mean_domain_acc1", metrics["acc1"]))
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None
