"""The plan of a grid: its cells, what they are evaluated on, and what is chosen from what."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlkr.comparison.methods import CellKind, Method
from vlkr.comparison.options import ZERO_SHOT, GridConfig
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataOptions, Dataset
from vlkr.errors import VlkrError
from vlkr.files import resource
from vlkr.models.names import absolute_names

#: names of a place in the grid, e.g. ``{"dataset": "digits", "shots": 4}``.
Place = dict[str, Any]
# Options that change how long a cell takes and not its result, and the cell's name.
_NOT_HASHED = {"num_workers", "accelerator", "progress", "id"}


@dataclass(frozen=True)
class EvalSet:
    """A dataset as cells are evaluated on it.

    Attributes:
        name: name in tables, unique among the sets of a cell.
        data: its images.
        split: split of that dataset.
    """

    name: str
    data: DataOptions
    split: str = "test"

    def load(self) -> Dataset:
        """Returns the dataset under this name, with these images as its only split ``"test"``."""
        dataset = self.data.load()
        sizes = {"test": dataset.sizes[self.split]} if self.split in dataset.sizes else {}
        splits = {"test": dataset.source(self.split)}
        return replace(dataset, name=self.name, splits=splits, sizes=sizes)


@dataclass(frozen=True)
class Cell:
    """One point of a grid, computed on its own and kept in a folder of its own.

    Attributes:
        id: name of the folder.
        kind: ``zero-shot``, ``probe``, ``adapter``, or ``run`` for an existing run.
        model: as for :func:`~vlkr.training.adapt.adapt`.
        pretrained: likewise.
        data: training data.
        sets: datasets to evaluate on.
        seed: None for what does not depend on one.
        adapter: method and targets, for kind ``adapter``.
        match_options: options of the method that ``adapter.match`` names.
        optimizer: for kind ``adapter``.
        trainer: for kind ``adapter``, and the device for all kinds.
        run: the run folder, for kind ``run``.
        run_sha256: fingerprint of its adapter.
    """

    id: str
    kind: CellKind
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
        """Returns every field as plain JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return plain

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cell:
        """Returns the cell whose :meth:`to_json` is ``value``."""
        sets = tuple(
            EvalSet(s["name"], DataOptions.read(s["data"]), s["split"]) for s in value["sets"]
        )
        return cls(
            **{
                **value,
                "data": DataOptions.read(value["data"]),
                "sets": sets,
                "adapter": AdapterConfig(**value["adapter"]),
                "optimizer": OptimizerConfig(**value["optimizer"]),
                "trainer": TrainerConfig(**value["trainer"]),
                "run": value["run"] and Path(value["run"]),
            }
        )

    @property
    def hash(self) -> str:
        """SHA-256 of all that the result depends on, except the files."""
        text = json.dumps(_hashed(self.to_json()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _hashed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hashed(part) for key, part in value.items() if key not in _NOT_HASHED}
    return [_hashed(part) for part in value] if isinstance(value, list) else value


class Reading(NamedTuple):
    """Where a validation accuracy is: on a cell's set, or (None) that of its training."""

    cell: str
    set: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One setting among those that validation chooses from.

    Attributes:
        setting: ``{"lr": 0.001, "epochs": 20}``, or empty.
        cells: ids, one per seed.
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
        place: ``{"dataset": "digits", "shots": 4}``; without ``shots`` it holds for all of them.
        candidates: one or more.
        sets: names of the sets that are reported, the in-distribution one first.
    """

    method: str
    place: Place
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


class SettingCells(NamedTuple):
    """The cells of one setting of a method in one place, one per seed."""

    setting: dict[str, float]
    cells: list[Cell]

    def candidate(self, validation_set: str | None = None) -> Candidate:
        """Returns the candidate that is chosen by the validation accuracy of its own cells.

        Args:
            validation_set: name among their sets; None for the validation of their training.
        """
        ids = tuple(cell.id for cell in self.cells)
        return Candidate(self.setting, ids, tuple(Reading(i, validation_set) for i in ids))


def grid_cells(
    grid: GridConfig,
    method: Method,
    where: tuple[object, ...],
    data: DataOptions,
    sets: Sequence[EvalSet],
) -> list[SettingCells]:
    """Returns a method's cells in one place of the grid, for each of its settings.

    Args:
        grid: options.
        method: with its settings.
        where: names of the place, for the cells' ids.
        data: training data.
        sets: datasets that the cells are evaluated on.
    """
    model, pretrained = absolute_names(grid.model, grid.pretrained)
    seeds: list[int | None] = [None] if method.kind == ZERO_SHOT else [*grid.seeds]
    cells = []
    for setting in method.settings:
        trainer, train_data, name = grid.trainer, data, [*where, method.label]
        if method.kind == "adapter":
            epochs = int(setting["epochs"])
            trainer = replace(trainer, epochs=epochs)
            if grid.steps_per_shot is not None:
                steps = math.ceil(grid.steps_per_shot * data.shots / epochs)
                train_data = replace(data, min_steps_per_epoch=steps)
            name += [f"lr{setting['lr']:g}", f"epochs{epochs}"]
        of_setting = [
            Cell(
                slug(*name, *([] if seed is None else [f"seed{seed}"])),
                method.kind,
                model,
                pretrained,
                train_data,
                tuple(sets),
                seed,
                method.adapter,
                method.match_options,
                replace(grid.optimizer, lr=setting.get("lr", grid.optimizer.lr)),
                trainer,
            )
            for seed in seeds
        ]
        cells.append(SettingCells(setting, of_setting))
    return cells


def slug(*parts: object) -> str:
    """Returns a name for a folder.

    >>> slug("wds/digits", "lora rank=2", "seed1")
    'wds_digits-lora_rank=2-seed1'
    """
    return "-".join(re.sub(r"[^\w.=+]+", "_", str(part)) for part in parts)


def with_dataset(reference: str, data: DataOptions) -> DataOptions:
    """Returns the data options with a different dataset: a card's name, a URL, or a path."""
    is_card = resource(f"data/{reference}.yaml").is_file()
    if is_card or not Path(reference).exists():
        return replace(data, name=reference, root=None)
    return replace(data, name=None, root=Path(reference).resolve())


def eval_only(reference: str, data: DataOptions) -> DataOptions:
    """Returns options for a dataset to evaluate on with the prompts of ``data``."""
    shared = DataOptions(
        templates=data.templates, test_fraction=data.test_fraction, num_workers=data.num_workers
    )
    return with_dataset(reference, shared)


def dataset_name(data: DataOptions) -> str:
    """Returns a dataset's name in tables; raises :class:`VlkrError` if there is none."""
    if data.name is None and data.root is None:
        raise VlkrError("no dataset: give --data.name CARD or --data.root FOLDER")
    return data.label if data.root is None else data.root.name


def eval_sets(datasets: Sequence[DataOptions]) -> tuple[EvalSet, ...]:
    """Returns their test splits by name; raises :class:`VlkrError` if two share a name."""
    sets = tuple(EvalSet(dataset_name(data), data) for data in datasets)
    check_unique([eval_set.name for eval_set in sets])
    return sets


def check_unique(names: Sequence[str]) -> None:
    """Raises :class:`VlkrError` if two datasets share a name."""
    for name in names:
        if names.count(name) > 1:
            raise VlkrError(f"two datasets are named {name!r}; rename one of the folders")


def load_or_describe(data: DataOptions, *, needed: bool) -> Dataset | None:
    """Returns the dataset, or what its card says if it is absent; None without a card.

    Raises:
        VlkrError: if it is absent but needed.
    """
    try:
        return data.load()
    except VlkrError:
        if needed:
            raise
        return data.described()
