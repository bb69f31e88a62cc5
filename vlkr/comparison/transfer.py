"""Transfer: adapted to one dataset, measured on others, before and after."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from vlkr.comparison.compare import DIFFERENCES
from vlkr.comparison.figures import plot_bars, plot_calibration, plot_home_against_shift
from vlkr.comparison.grid import candidate, grid_cells, resolved
from vlkr.comparison.options import GridOptions
from vlkr.comparison.outcomes import Collected, Outcome
from vlkr.comparison.plan import RUN, ZERO_SHOT, Candidate, Cell, Entry, EvalSet, Plan, slug
from vlkr.comparison.report import Picture, Report
from vlkr.comparison.running import (
    Found,
    at_hand,
    base_context,
    data_name,
    elsewhere,
    eval_sets,
    found_context,
    run_grid,
)
from vlkr.comparison.tables import (
    Table,
    Values,
    choice_note,
    choice_table,
    compare_to_reference,
    cost_table,
    difference_table,
    method_table,
    parameters_row,
    spread,
    values_at,
)
from vlkr.datasets import DataOptions
from vlkr.errors import VlkrError
from vlkr.evaluation.metrics import base_to_new
from vlkr.evaluation.runs import run_config, run_labels, run_options
from vlkr.files import sha256_of
from vlkr.models.names import is_timm

NEW = " (new classes)"


def run_transfer(
    grid: GridOptions, output: Path, run: list[Path] | None, datasets: list[str] | None
) -> Found:
    """What :func:`~vlkr.comparison.commands.transfer` does."""
    if not is_timm(grid.model) and ZERO_SHOT not in [m.kind for m in resolved(grid)]:
        grid = replace(grid, methods=[ZERO_SHOT, *grid.methods])

    def plan() -> Plan:
        configs = {folder.resolve(): run_config(folder) for folder in run or ()}
        return transfer_plan(grid, configs, datasets)

    return run_grid(grid, output, plan, lambda found: transfer_report(found, output))


def transfer_plan(
    grid: GridOptions, runs: dict[Path, dict[str, Any]], datasets: list[str] | None
) -> Plan:
    """The cells of a transfer.

    Args:
        grid: options.
        runs: configurations of runs by folder; without any, the grid's methods are trained.
        datasets: to measure on beside the one that is adapted to.
    """
    if runs:
        grid = _as_the_runs(grid, list(runs.values()))
    data = grid.data.absolute()
    sets = _sets(grid, data, datasets)
    names = tuple(chosen.name for chosen in sets)
    cells: list[Cell] = []
    entries: list[Entry] = []
    for method in [] if runs and is_timm(grid.model) else resolved(grid):
        found = grid_cells(grid, method, (names[0],), data, sets)
        candidates = tuple(candidate(setting, own, None) for setting, own in found)
        entries.append(Entry(method.label, {"source": names[0]}, candidates, names))
        cells += [cell for _, own in found for cell in own]
    for label, folders in _by_method(runs).items():
        own = [
            Cell(
                slug(names[0], "run", label, f"seed{runs[folder]['seed']}", i + 1),
                RUN,
                grid.model,
                grid.pretrained,
                data,
                tuple(sets),
                runs[folder]["seed"],
                trainer=grid.trainer,
                run=folder,
                run_sha256=_sha256(folder),
            )
            for i, folder in enumerate(folders)
        ]
        ids = tuple(cell.id for cell in own)
        entries.append(Entry(label, {"source": names[0]}, (Candidate({}, ids),), names))
        cells += own
    context = base_context(grid, "by mean validation accuracy at home per method")
    if runs:
        context["seeds"] = " ".join(str(config["seed"]) for config in runs.values())
    context |= {
        "adapted to": names[0],
        **_common(data.context(), [run_options(c).context() for c in runs.values()]),
        "split": "test",
    }
    return Plan("transfer", tuple(cells), tuple(entries), grid.reference, context)


def _common(context: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known and the same for all; the labels of runs tell the rest."""
    return {
        key: value
        for key, value in context.items()
        if value is not None and all(other[key] == value for other in others)
    }


def _as_the_runs(grid: GridOptions, configs: Sequence[dict[str, Any]]) -> GridOptions:
    """The grid on the runs' model and data.

    Raises:
        VlkrError: if they have several.
    """
    homes = {
        (
            config["model"],
            config["pretrained"],
            data_name(run_options(config)),
            run_options(config).classes,
        )
        for config in configs
    }
    if len(homes) > 1:
        raise VlkrError(
            f"the runs are of {len(homes)} models, datasets or halves of classes, expected one"
        )
    first = configs[0]
    return replace(
        grid,
        model=first["model"],
        pretrained=first["pretrained"],
        data=run_options(first),
        methods=[ZERO_SHOT],
    )


def _by_method(runs: dict[Path, dict[str, Any]]) -> dict[str, list[Path]]:
    """Folders by method.

    Raises:
        VlkrError: for two with one seed.
    """
    named: dict[str, list[Path]] = {}
    for folder, label in run_labels(runs).items():
        named.setdefault(label, []).append(folder)
    for label, folders in named.items():
        seeds = [runs[folder]["seed"] for folder in folders]
        for seed in seeds:
            if seeds.count(seed) > 1:
                raise VlkrError(f"{seeds.count(seed)} runs of {label} have seed {seed}; give one")
    return named


def _sha256(run: Path) -> str:
    """Of what a run has learnt, so that a result is known to be of another state of its folder."""
    files = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "head.safetensors")
    return " ".join(sha256_of(run / name)[:16] for name in files if (run / name).is_file())


def _sets(grid: GridOptions, data: DataOptions, datasets: list[str] | None) -> list[EvalSet]:
    name = data_name(data)
    if data.classes == "new":
        raise VlkrError("data.classes 'new' cannot be adapted to, expected 'base' or 'all'")
    found = at_hand(data, needed=not grid.dry_run)
    names = datasets if datasets is not None else list(found.shifts if found else ())
    new = []
    if data.classes == "base":
        new = [EvalSet(f"{name}{NEW}", replace(data, classes="new", split_file=None))]
    if not names and not new:
        raise VlkrError(f"dataset {name!r} names no shifts; --datasets names what to measure on")
    home, *others = eval_sets([data, *(elsewhere(other, data) for other in names)])
    return [home, *new, *others]


def transfer_report(found: Collected, output: Path) -> Report:
    """Tables and plots of a transfer."""
    first = found.outcomes[0].entry
    place, names = first.place, first.sets
    before = next(
        (o for o in found.outcomes if o.results and o.results[0].cell.kind == ZERO_SHOT), None
    )
    rows: list[tuple[str, dict[str, Any], Values]] = [
        (f"{name} (adapted to)" if i == 0 else name, place, methodcaller("values", name))
        for i, name in enumerate(names)
    ]
    if names[1].endswith(NEW):
        rows.insert(2, ("harmonic mean of base and new", place, _harmonic))
    if len(names) > 2:
        rows.append((f"mean of {len(names) - 1} others", place, Outcome.shift_means))
    table = method_table(found, "top-1 %", rows)
    table.insert(1, parameters_row(found))
    tables = [Table(f"Adapted to {names[0]}, measured elsewhere", table)]
    if before is not None:
        note = "Points gained or, negative, forgotten: adapted less zero-shot, on the same images"
        tables.append(
            Table("Change against zero-shot", _changes(found, before, place, names), note)
        )
    differences = compare_to_reference(found, [place], lambda _: names)
    if differences:
        rows_ = difference_table(differences, found.plan.reference)
        tables.append(Table(f"Difference to {found.plan.reference}", rows_, DIFFERENCES))
    tables.append(Table("Cost", cost_table(found), "Memory is the largest of a method's cells"))
    if choices := choice_table(found):
        tables.append(Table("Choice of settings", choices, choice_note(found), brief=False))
    bars = {name: partial(values_at, found, place=place, name=name) for name in names}

    def home(method: str, _: dict[str, Any]) -> list[float]:
        return bars[names[0]](method)

    def others(method: str, _: dict[str, Any]) -> list[float]:
        outcome = found.at(method, place)
        return outcome.shift_means() if outcome else []

    pictures = [
        Picture("sets", "Accuracy by dataset", lambda path: plot_bars(found, bars, path)),
        Picture(
            "home-against-others",
            "Home against the others",
            lambda path: plot_home_against_shift(
                found, [place], home, others, (names[0], "mean of the others"), path
            ),
        ),
        Picture(
            "reliability",
            f"Reliability on {names[0]}, first seed",
            lambda path: plot_calibration(found, place, names[0], path),
        ),
    ]
    title = f"Transfer from {names[0]}"
    return Report(title, found_context(found), tables, pictures, differences, found, output)


def _harmonic(outcome: Outcome) -> list[float]:
    base, new = (outcome.values(name) for name in outcome.entry.sets[:2])
    return [base_to_new(a, b)["harmonic_mean"] for a, b in zip(base, new, strict=True)]


def _changes(
    found: Collected, before: Outcome, place: dict[str, Any], names: Sequence[str]
) -> list[list[str]]:
    """Points by set and method, their mean over the other sets, and the largest loss there."""
    methods = [
        m for m in found.methods if (o := found.at(m, place)) is not None and o is not before
    ]
    columns: list[list[str]] = []
    for method in methods:
        outcome = found.at(method, place)
        assert outcome is not None
        each = {
            name: [value - before.values(name)[0] for value in outcome.values(name)]
            for name in names
        }
        others = [each[name] for name in names[1:]]
        worst = min(names[1:], key=lambda name: statistics.mean(each[name]))
        columns.append(
            [
                *(spread(each[name]) for name in names),
                spread([statistics.mean(values) for values in zip(*others, strict=True)]),
                f"{spread(each[worst])} ({worst})",
            ]
        )
    labels = [*names, f"mean of {len(names) - 1} others", "least of the others"]
    rows = zip(labels, *columns, strict=True)
    return [["change, points", *methods], *(list(row) for row in rows)]
