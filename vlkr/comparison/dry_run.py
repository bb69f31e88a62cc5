"""The size of a grid: cells, images, parameters and steps, without computing any."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vlkr.adapters import count_parameters
from vlkr.comparison.plan import Cell, Plan
from vlkr.datasets import DataConfig, Dataset
from vlkr.errors import VlkrError
from vlkr.reporting.table import Table, caption, value_range

UNKNOWN = "unknown"
_MAX_REASONS = 3


@dataclass(frozen=True)
class DryRun:
    """A plan and its sizes.

    Attributes:
        plan: of the grid.
        table: sizes by method.
        cells: number of cells.
        steps: training steps of all cells together; None where a dataset is missing.
        missing: datasets and models that cannot be read, and why; the sizes of a dataset are then
            its card's.
    """

    exit_code = 0

    plan: Plan
    table: Table
    cells: int
    steps: int | None
    missing: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            **self.plan.context,
            "cells": self.cells,
            "steps": self.steps,
            "plan": [dict(zip(self.table.header, row, strict=True)) for row in self.table.rows],
            "missing": self.missing,
            "ids": [cell.id for cell in self.plan.cells],
        }

    def tables(self) -> list[Table]:
        """Returns the table."""
        return [self.table]

    def lines(self) -> list[str]:
        """Returns totals, the context and what is missing."""
        steps = UNKNOWN if self.steps is None else f"{self.steps:,}"
        lines = [f"{self.cells} cells, {steps} training steps in all", caption(self.plan.context)]
        if len(self.missing) > _MAX_REASONS:
            return [*lines, f"not at hand: {', '.join(self.missing)} (--json tells why)"]
        return lines + [f"not at hand: {name} ({why})" for name, why in self.missing.items()]


def dry_run(plan: Plan) -> DryRun:
    """Sizes a plan, from its data or else from the data's card."""
    sizes = _Sizes()
    cells = {cell.id: cell for cell in plan.cells}
    header = ("method", "cells", "parameters", "training images", "steps a cell")
    rows = []
    for method in dict.fromkeys(entry.method for entry in plan.entries):
        ids = [
            cell
            for entry in plan.entries
            if entry.method == method
            for candidate in entry.candidates
            for cell in (*candidate.cells, *(reading.cell for reading in candidate.readings))
        ]
        own = [cells[cell] for cell in dict.fromkeys(ids)]
        columns = (sizes.parameters, sizes.train_images, sizes.steps, sizes.measured)
        ranges = (value_range([size(cell) for cell in own], UNKNOWN) for size in columns)
        rows.append((method, str(len(own)), *ranges))
    steps = [sizes.steps(cell) for cell in plan.cells]
    total = None if None in steps else sum(step or 0 for step in steps)
    title = f"Plan of vlkr {plan.command}"
    table = Table(title, (*header, "measured images"), tuple(rows))
    return DryRun(plan, table, len(cells), total, sizes.missing)


class _Sizes:
    """Sizes of datasets and models, each looked up once."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.known: dict[str, Any] = {}

    def _once(
        self,
        key: str,
        name: str,
        make: Callable[[], Any],
        otherwise: Callable[[], Any] = lambda: None,
    ) -> Any:
        if key not in self.known:
            try:
                self.known[key] = make()
            except VlkrError as error:
                self.known[key] = otherwise()
                self.missing[name] = str(error)
        return self.known[key]

    def dataset(self, data: DataConfig) -> Dataset | None:
        about = {**asdict(data), "shots": 1, "min_steps_per_epoch": 1}
        key = json.dumps(about, sort_keys=True, default=str)
        name = str(data.root or data.name)
        dataset: Dataset | None = self._once(key, name, data.load, data.described)
        return dataset

    def model(self, name: str) -> nn.Module | None:
        from vlkr.models.loading import load_shapes  # imports open_clip

        model: nn.Module | None = self._once(f"model {name}", name, lambda: load_shapes(name))
        return model

    def images(self, data: DataConfig, split: str) -> int | None:
        dataset = self.dataset(data)
        if dataset is None:
            return None
        files = getattr(dataset.splits.get(split), "files", None)
        return dataset.sizes.get(split, None if files is None else len(files))

    def train_images(self, cell: Cell) -> int | None:
        if cell.seed is None or cell.run is not None:
            return 0
        dataset = self.dataset(cell.config.data)
        if dataset is None:
            return None
        if cell.config.data.fraction is not None:
            images = self.images(cell.config.data, "train")
            return None if images is None else round(cell.config.data.fraction * images)
        groups = max(1, len(dataset.domains)) if cell.config.data.per_domain else 1
        wanted = cell.config.data.shots * len(dataset.class_names) * groups
        available = self.images(cell.config.data, "train")
        return wanted if available is None else min(wanted, available)

    def steps(self, cell: Cell) -> int | None:
        """Optimizer steps: batches over the epochs, as the sampler cuts them."""
        images = self.train_images(cell)
        if images == 0 or cell.kind == "probe":
            return 0
        if images is None:
            return None
        batches = max(
            cell.config.data.min_steps_per_epoch, math.ceil(images / cell.config.data.batch_size)
        )
        return cell.config.trainer.epochs * math.ceil(
            batches / cell.config.trainer.accumulate_grad_batches
        )

    def measured(self, cell: Cell) -> int | None:
        numbers = [self.images(eval_set.data, eval_set.split) for eval_set in cell.sets]
        return None if None in numbers else sum(number or 0 for number in numbers)

    def parameters(self, cell: Cell) -> int | None:
        if cell.seed is None or cell.run is not None:
            return 0
        model = self.model(cell.config.model)
        if model is None:
            return None
        if cell.kind == "probe":
            return self._classifier(cell, model, bias=1)
        adapter = cell.config.adapter
        key = json.dumps([cell.config.model, asdict(adapter), cell.match_options], sort_keys=True)

        def count() -> int:
            resolved = cell.config.resolved(model, cell.match_options).adapter
            return count_parameters(resolved.name, model, **resolved.place(), **resolved.options)

        number: int | None = self._once(key, adapter.name, count)
        if number is None or hasattr(model, "encode_text"):
            return number
        learned = self._classifier(cell, model, bias=0)
        return None if learned is None else number + learned

    def _classifier(self, cell: Cell, model: nn.Module, bias: int) -> int | None:
        """Parameters of a linear classifier on image features, ``bias`` of them per class."""
        dataset, width = self.dataset(cell.config.data), _embed_dim(model)
        if dataset is None or width is None:
            return None
        return (width + bias) * len(dataset.class_names)


def _embed_dim(model: nn.Module) -> int | None:
    for tower, name in (
        ("visual", "output_dim"),
        ("visual", "num_features"),
        ("text", "output_dim"),
    ):
        width = getattr(getattr(model, tower, None), name, None)
        if isinstance(width, int):
            return width
    return None
