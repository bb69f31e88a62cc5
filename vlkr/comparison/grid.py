"""The methods of a grid, and the cells that follow from its options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlkr.adapters.registry import ADAPTERS, adapter_class, check_options
from vlkr.comparison.options import GridOptions, MethodOptions
from vlkr.comparison.plan import PROBE, ZERO_SHOT, Candidate, Cell, EvalSet, Reading, slug
from vlkr.config import AdapterConfig
from vlkr.datasets import DataOptions
from vlkr.errors import VlkrError
from vlkr.models.names import absolute_names, is_timm


@dataclass(frozen=True)
class Method:
    """A method of a grid, resolved.

    Attributes:
        label: in tables.
        kind: of its cells.
        adapter: for kind ``adapter``.
        match_options: of the method whose budget is to be met.
        settings: learning rates and epochs to choose from; one empty setting for the others.
    """

    label: str
    kind: str
    adapter: AdapterConfig = AdapterConfig()
    match_options: dict[str, Any] = field(default_factory=dict)
    settings: list[dict[str, float]] = field(default_factory=lambda: [{}])


def check_grid(grid: GridOptions) -> None:
    """Raises :class:`VlkrError` for an option that does not make sense."""
    lists: dict[str, Sequence[float] | None] = {"seeds": grid.seeds}
    owners: list[tuple[str, GridOptions | MethodOptions]] = [("", grid)]
    for of, owner in [*owners, *((f" of {m.name}", m) for m in _given(grid))]:
        lists |= {f"lrs{of}": owner.lrs, f"epochs{of}": owner.epochs}
    for name, numbers in lists.items():
        if numbers is not None and (not numbers or len(set(numbers)) < len(numbers)):
            raise VlkrError(
                f"{name} {numbers} is empty or repeats itself, expected different numbers"
            )
    for seed in grid.seeds:
        if not 0 <= seed < 2**32:
            raise VlkrError(f"seed {seed} is out of range, expected 0 to {2**32 - 1}")
    if grid.jobs < 0:
        raise VlkrError(f"jobs {grid.jobs} is negative, expected 0 or more")
    if grid.jobs == 0 and grid.force:
        raise VlkrError("jobs 0 computes nothing, so that there is nothing to force")
    if grid.steps_per_shot is not None and grid.steps_per_shot < 1:
        raise VlkrError(f"steps_per_shot {grid.steps_per_shot} is too small, expected 1 or more")
    if grid.launcher != "local" and "{command}" not in grid.launcher:
        raise VlkrError(f"launcher {grid.launcher!r} lacks {{command}}, or is not 'local'")
    if grid.trainer.devices > 1 or grid.trainer.num_nodes > 1:
        raise VlkrError("a cell trains on one device; --jobs and --launcher share out the cells")
    methods = resolved(grid)
    if is_timm(grid.model) and any(m.kind == ZERO_SHOT for m in methods):
        raise VlkrError(f"{grid.model} has no text for {ZERO_SHOT}; leave it out of the methods")
    labels = [method.label for method in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise VlkrError(f"two methods are labelled {label!r}; give them a label each")
    if grid.reference not in labels and grid.reference != GridOptions.reference:
        raise VlkrError(
            f"reference {grid.reference!r} is none of the methods, which are {', '.join(labels)}"
        )
    for method in methods:
        for setting in filter(None, method.settings):
            replace(grid.optimizer, lr=setting["lr"]).check()
            replace(grid.trainer, epochs=int(setting["epochs"])).check()


def resolved(grid: GridOptions) -> list[Method]:
    """The methods, with their adapters and settings.

    Raises:
        VlkrError: for an unknown method, option or budget.
    """
    given = _given(grid)
    if not given:
        raise VlkrError("methods is empty, expected e.g. zero-shot kradapter lora")
    match = _match(grid)
    # The method to meet counts with the options that it has in this grid.
    match_options = next((m.options for m in given if m.name == match), {})
    return [_method(grid, m, match, match_options) for m in given]


def _given(grid: GridOptions) -> list[MethodOptions]:
    return [MethodOptions(m) if isinstance(m, str) else m for m in grid.methods]


def _match(grid: GridOptions) -> str | None:
    word, _, name = grid.budget.partition(" ")
    if grid.budget == "own":
        return None
    if word != "match" or not name:
        raise VlkrError(f"budget {grid.budget!r} is neither 'own' nor 'match METHOD'")
    adapter_class(name.strip())
    return name.strip()


def _method(
    grid: GridOptions, given: MethodOptions, match: str | None, match_options: dict[str, Any]
) -> Method:
    label = given.label or " ".join(
        [given.name, *(f"{key}={value}" for key, value in given.options.items())]
    )
    if given.name in (ZERO_SHOT, PROBE):
        return Method(label, given.name)
    if given.name not in ADAPTERS:
        known = ", ".join((ZERO_SHOT, PROBE, *ADAPTERS))
        raise VlkrError(f"unknown method {given.name!r}; known: {known}")
    check_options(given.name, given.options)
    size = adapter_class(given.name).budget_option
    matched = match is not None and size is not None and given.name != match
    if matched and size in given.options:
        raise VlkrError(
            f"method {label!r} has its own {size}, and budget {grid.budget!r} chooses it; "
            "leave one of them out (budget: own)"
        )
    adapter = AdapterConfig(
        given.name,
        grid.targets,
        grid.towers,
        grid.blocks,
        given.options,
        match if matched else None,
    )
    settings = [
        {"lr": lr, "epochs": epochs}
        for lr in given.lrs or grid.lrs or [grid.optimizer.lr]
        for epochs in given.epochs or grid.epochs or [grid.trainer.epochs]
    ]
    return Method(label, "adapter", adapter, match_options if matched else {}, settings)


def grid_cells(
    grid: GridOptions,
    method: Method,
    where: tuple[object, ...],
    data: DataOptions,
    sets: list[EvalSet],
) -> list[tuple[dict[str, float], list[Cell]]]:
    """A method's cells in one place of the grid: for each setting, one a seed.

    Args:
        grid: options.
        method: resolved.
        where: names of the place, for the cells' ids.
        data: to train on.
        sets: what the cells are measured on.
    """
    model, pretrained = absolute_names(grid.model, grid.pretrained)
    found = []
    for setting in method.settings:
        trainer, options, name = grid.trainer, data, [*where, method.label]
        if method.kind == "adapter":
            epochs = int(setting["epochs"])
            trainer = replace(trainer, epochs=epochs)
            if grid.steps_per_shot is not None:
                steps = math.ceil(grid.steps_per_shot * data.shots / epochs)
                options = replace(data, min_steps_per_epoch=steps)
            name += [f"lr{setting['lr']:g}", f"epochs{epochs}"]
        seeds: list[int | None] = [None] if method.kind == ZERO_SHOT else [*grid.seeds]
        cells = [
            Cell(
                slug(*name, *([] if seed is None else [f"seed{seed}"])),
                method.kind,
                model,
                pretrained,
                options,
                tuple(sets),
                seed,
                method.adapter,
                method.match_options,
                replace(grid.optimizer, lr=setting.get("lr", grid.optimizer.lr)),
                trainer,
            )
            for seed in seeds
        ]
        found.append((setting, cells))
    return found


def candidate(setting: dict[str, float], cells: list[Cell], set_name: str | None) -> Candidate:
    """A candidate whose own cells carry the validation accuracy.

    Args:
        setting: of these cells.
        cells: one a seed.
        set_name: the validation set among their sets; None for the one of their training.
    """
    ids = tuple(cell.id for cell in cells)
    return Candidate(setting, ids, tuple(Reading(i, set_name) for i in ids))
