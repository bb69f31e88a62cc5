"""The plan of a grid: its cells, what they are evaluated on, and what is chosen from what."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlkr.comparison.methods import CellKind, Method
from vlkr.comparison.options import ZERO_SHOT, GridConfig
from vlkr.datasets import DataConfig, Dataset
from vlkr.errors import VlkrError
from vlkr.files import json_sha256, resource
from vlkr.models.names import absolute_names
from vlkr.runs import RunConfig
from vlkr.validation import from_plain

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
    data: DataConfig
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
        config: what is trained, as for ``vlkr adapt``; other kinds than ``adapter`` use its model,
            data, seed and device.
        sets: datasets to evaluate on.
        match_options: options of the method that ``config.adapter.match`` names.
        run: the run folder, for kind ``run``.
        run_sha256: fingerprint of its adapter.
    """

    id: str
    kind: CellKind
    config: RunConfig
    sets: tuple[EvalSet, ...]
    match_options: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    run_sha256: str | None = None

    @property
    def seed(self) -> int | None:
        """The seed of its results; None for zero-shot, which does not depend on one."""
        return None if self.kind == ZERO_SHOT else self.config.seed

    def to_json(self) -> dict[str, Any]:
        """Returns the cell as ``cell.json`` holds it and as it is hashed, the same in all versions.

        An option that is added later must be left out here where it has its default.
        """
        value = {
            "id": self.id,
            "kind": self.kind,
            **self.config.to_plain(),
            "sets": [asdict(eval_set) for eval_set in self.sets],
            "seed": self.seed,
            "match_options": dict(self.match_options),
            "run": self.run,
            "run_sha256": self.run_sha256,
        }
        plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
        return plain

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cell:
        """Returns the cell whose :meth:`to_json` is ``value``."""
        return cls(
            value["id"],
            value["kind"],
            from_plain(RunConfig, {**value, "seed": value["seed"] or 0}, "cell"),
            tuple(
                EvalSet(part["name"], from_plain(DataConfig, part["data"], "data"), part["split"])
                for part in value["sets"]
            ),
            value["match_options"],
            value["run"] and Path(value["run"]),
            value["run_sha256"],
        )

    @property
    def hash(self) -> str:
        """SHA-256 of all that the result depends on, except the files."""
        return json_sha256(_hashed(self.to_json()))


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
    data: DataConfig,
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
        name = [*where, method.label]
        config = RunConfig(model, pretrained, method.adapter, data, grid.optimizer, grid.trainer)
        if method.kind == "adapter":
            epochs = int(setting["epochs"])
            if grid.steps_per_shot is not None:
                steps = math.ceil(grid.steps_per_shot * data.shots / epochs)
                config = replace(config, data=replace(data, min_steps_per_epoch=steps))
            optimizer = replace(grid.optimizer, lr=setting["lr"])
            trainer = replace(grid.trainer, epochs=epochs)
            config = replace(config, optimizer=optimizer, trainer=trainer)
            name += [f"lr{setting['lr']:g}", f"epochs{epochs}"]
        of_setting = [
            Cell(
                slug(*name, *([] if seed is None else [f"seed{seed}"])),
                method.kind,
                config if seed is None else replace(config, seed=seed),
                tuple(sets),
                method.match_options,
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


def with_dataset(reference: str, data: DataConfig) -> DataConfig:
    """Returns the data options with a different dataset: a card's name, a URL, or a path."""
    is_card = resource(f"data/{reference}.yaml").is_file()
    if is_card or not Path(reference).exists():
        return replace(data, name=reference, root=None)
    return replace(data, name=None, root=Path(reference).resolve())


def eval_only(reference: str, data: DataConfig) -> DataConfig:
    """Returns options for a dataset to evaluate on with the prompts of ``data``."""
    shared = DataConfig(
        templates=data.templates, test_fraction=data.test_fraction, num_workers=data.num_workers
    )
    return with_dataset(reference, shared)


def dataset_name(data: DataConfig) -> str:
    """Returns a dataset's name in tables; raises :class:`VlkrError` if there is none."""
    if data.name is None and data.root is None:
        raise VlkrError("no dataset: give --data.name CARD or --data.root FOLDER")
    return data.label if data.root is None else data.root.name


def eval_sets(datasets: Sequence[DataConfig]) -> tuple[EvalSet, ...]:
    """Returns their test splits by name; raises :class:`VlkrError` if two share a name."""
    sets = tuple(EvalSet(dataset_name(data), data) for data in datasets)
    check_unique([eval_set.name for eval_set in sets])
    return sets


def check_unique(names: Sequence[str]) -> None:
    """Raises :class:`VlkrError` if two datasets share a name."""
    for name in names:
        if names.count(name) > 1:
            raise VlkrError(f"two datasets are named {name!r}; rename one of the folders")


def load_or_describe(data: DataConfig, *, needed: bool) -> Dataset | None:
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
