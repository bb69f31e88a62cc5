"""The plan of a grid: what is computed, what it is measured on, and what is chosen from what."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataOptions, Dataset

ZERO_SHOT, PROBE, RUN = "zero-shot", "probe", "run"
# Options that change how long a cell takes and not what it finds.
_NEUTRAL = ("num_workers", "accelerator", "progress")


@dataclass(frozen=True)
class EvalSet:
    """A dataset as cells are measured on it.

    Attributes:
        name: in tables; one of a kind among those of a cell.
        data: where its images are, and which of them.
        split: of that dataset.
    """

    name: str
    data: DataOptions
    split: str = "test"

    def load(self) -> Dataset:
        """The dataset under this name, with these images as its one split ``"test"``."""
        dataset = self.data.load()
        sizes = {"test": dataset.sizes[self.split]} if self.split in dataset.sizes else {}
        splits = {"test": dataset.source(self.split)}
        return replace(dataset, name=self.name, splits=splits, sizes=sizes)


@dataclass(frozen=True)
class Cell:
    """One point of a grid, computed on its own and kept in a folder of its own.

    Attributes:
        id: name of the folder.
        kind: ``zero-shot``, ``probe``, ``adapter``, or ``run`` for a run that is there already.
        model: as for :func:`~vlkr.training.adapt.adapt`.
        pretrained: likewise.
        data: to train on.
        sets: what it is measured on.
        seed: None for what does not depend on one.
        adapter: method and targets, for kind ``adapter``.
        match_options: of the method that ``adapter.match`` names.
        optimizer: for kind ``adapter``.
        trainer: for kind ``adapter``, and the device for all.
        run: the folder, for kind ``run``.
        run_sha256: of its adapter.
    """

    id: str
    kind: str
    model: str
    pretrained: str | None
    data: DataOptions
    sets: tuple[EvalSet, ...]
    seed: int | None = None
    adapter: AdapterConfig = AdapterConfig()
    match_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    run: Path | None = None
    run_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return plain

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Cell:
        """The cell that :meth:`to_json` told."""
        sets = tuple(
            EvalSet(s["name"], DataOptions.read(s["data"]), s["split"]) for s in found["sets"]
        )
        return cls(
            **{
                **found,
                "data": DataOptions.read(found["data"]),
                "sets": sets,
                "adapter": AdapterConfig(**found["adapter"]),
                "optimizer": OptimizerConfig(**found["optimizer"]),
                "trainer": TrainerConfig(**found["trainer"]),
                "run": found["run"] and Path(found["run"]),
            }
        )

    @property
    def hash(self) -> str:
        """SHA-256 of all that the result depends on, beside the files."""
        text = json.dumps(_without_neutral(self.to_json()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Reading(NamedTuple):
    """Where a validation accuracy stands: on a cell's set, or (None) on its training's own one."""

    cell: str
    set: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One setting of what is chosen on validation.

    Attributes:
        setting: ``{"lr": 0.001, "epochs": 20}``, or empty.
        cells: ids, one a seed.
        readings: validation accuracies whose mean decides.
    """

    setting: dict[str, float]
    cells: tuple[str, ...]
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One entry of the tables: a method in one place, and the settings it is chosen from.

    Attributes:
        method: label.
        place: ``{"dataset": "digits", "shots": 4}``; without ``shots`` it stands for all of them.
        candidates: one or more.
        sets: names of the sets that are reported, home first.
    """

    method: str
    place: dict[str, Any]
    candidates: tuple[Candidate, ...]
    sets: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All cells of a grid, and the entries that are made of them.

    Attributes:
        command: ``compare``, ``dg`` or ``transfer``.
        cells: in the order of computing.
        entries: in the order of the tables.
        reference: label of the method that others are compared with.
        context: what the numbers depend on, for captions.
    """

    command: str
    cells: tuple[Cell, ...]
    entries: tuple[Entry, ...]
    reference: str
    context: dict[str, Any]


def slug(*parts: object) -> str:
    """A name for a folder.

    >>> slug("wds/digits", "lora rank=2", "seed1")
    'wds_digits-lora_rank=2-seed1'
    """
    return "-".join(re.sub(r"[^\w.=+]+", "_", str(part)) for part in parts)


def _without_neutral(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_neutral(v) for k, v in value.items() if k not in (*_NEUTRAL, "id")}
    return [_without_neutral(v) for v in value] if isinstance(value, list) else value
