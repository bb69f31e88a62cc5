"""Transfer: adapted to one dataset, evaluated on others, before and after."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from vlkr.comparison.dry_run import DryRun
from vlkr.comparison.engine import CellStates, run_grid
from vlkr.comparison.figures import plot_bars, plot_calibration, plot_shift
from vlkr.comparison.methods import base_context, resolve_methods
from vlkr.comparison.options import ZERO_SHOT, GridConfig
from vlkr.comparison.plan import (
    Candidate,
    Cell,
    Entry,
    EvalSet,
    Place,
    Plan,
    dataset_name,
    eval_only,
    eval_sets,
    grid_cells,
    load_or_describe,
    slug,
)
from vlkr.comparison.report import Picture, Report, standard_report
from vlkr.comparison.results import GridResults, SelectedRuns
from vlkr.comparison.tables import Values, compare_to_reference, method_table
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.evaluation.metrics import base_to_new
from vlkr.models.names import is_timm
from vlkr.reporting.table import Table, mean_std
from vlkr.runs import RunConfig, RunFolder, method_labels

NEW = " (new classes)"


def run_transfer(
    grid: GridConfig,
    output: Path,
    *,
    runs: Sequence[Path] | None = None,
    datasets: list[str] | None = None,
) -> Report | CellStates | DryRun:
    """Adapts to one dataset and evaluates on it and on others, zero-shot before, adapted after.

    Args:
        grid: options; ``data`` is adapted to.
        output: folder of the cells and of the report.
        runs: run folders, all on one dataset; nothing is trained then.
        datasets: card names or folders to evaluate on in addition; by default the shifts of the
            dataset's card.

    Raises:
        VlkrError: for any option that does not make sense, before anything is written.
    """
    if not is_timm(grid.model) and ZERO_SHOT not in [m.kind for m in resolve_methods(grid)]:
        grid = replace(grid, methods=[ZERO_SHOT, *grid.methods])

    def plan() -> Plan:
        folders = [RunFolder.open(folder.resolve()) for folder in runs or ()]
        return transfer_plan(grid, folders, datasets)

    return run_grid(grid, output, plan, lambda results: transfer_report(results, output))


def transfer_plan(grid: GridConfig, runs: Sequence[RunFolder], datasets: list[str] | None) -> Plan:
    """Returns the cells of a transfer.

    Args:
        grid: options.
        runs: finished runs; without any, the grid's methods are trained.
        datasets: to evaluate on besides the one that is adapted to.
    """
    if runs:
        grid = _as_the_runs(grid, runs)
    data = grid.data.absolute()
    sets = _sets(grid, data, datasets)
    names = tuple(eval_set.name for eval_set in sets)
    place: Place = {"source": names[0]}
    cells: list[Cell] = []
    entries: list[Entry] = []
    for method in [] if runs and is_timm(grid.model) else resolve_methods(grid):
        settings = grid_cells(grid, method, (names[0],), data, sets)
        candidates = tuple(setting.candidate() for setting in settings)
        entries.append(Entry(method.label, place, candidates, names))
        cells += [cell for setting in settings for cell in setting.cells]
    for label, same in _by_method(runs).items():
        own = [
            Cell(
                slug(names[0], "run", label, f"seed{run.config.seed}", i + 1),
                "run",
                RunConfig(
                    grid.model,
                    grid.pretrained,
                    data=data,
                    trainer=grid.trainer,
                    seed=run.config.seed,
                ),
                tuple(sets),
                run=run.path,
                run_sha256=run.fingerprint(),
            )
            for i, run in enumerate(same)
        ]
        candidate = Candidate({}, tuple(cell.id for cell in own))
        entries.append(Entry(label, place, (candidate,), names))
        cells += own
    context = base_context(grid, "by mean in-distribution validation accuracy per method")
    if runs:
        context["seeds"] = " ".join(str(run.config.seed) for run in runs)
    context |= {
        "adapted to": names[0],
        **_common(data.context(), [run.config.data.context() for run in runs]),
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


def _as_the_runs(grid: GridConfig, runs: Sequence[RunFolder]) -> GridConfig:
    """The grid with the model and data of the runs, which must all have the same."""
    different = {
        (
            run.config.model,
            run.config.pretrained,
            dataset_name(run.config.data),
            run.config.data.classes,
        )
        for run in runs
    }
    if len(different) > 1:
        raise VlkrError(
            f"the runs are of {len(different)} models, datasets or halves of classes, expected one"
        )
    first = runs[0].config
    return replace(
        grid,
        model=first.model,
        pretrained=first.pretrained,
        data=first.data,
        methods=[ZERO_SHOT],
    )


def _by_method(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """Runs by method; raises :class:`VlkrError` for two with the same seed."""
    labeled: dict[str, list[RunFolder]] = {}
    labels = method_labels(runs)
    for run in runs:
        labeled.setdefault(labels[run.path], []).append(run)
    for label, same in labeled.items():
        seeds = [run.config.seed for run in same]
        for seed in seeds:
            if seeds.count(seed) > 1:
                raise VlkrError(f"{seeds.count(seed)} runs of {label} have seed {seed}; give one")
    return labeled


def _sets(grid: GridConfig, data: DataConfig, datasets: list[str] | None) -> list[EvalSet]:
    name = dataset_name(data)
    if data.classes == "new":
        raise VlkrError("data.classes 'new' cannot be adapted to, expected 'base' or 'all'")
    dataset = load_or_describe(data, needed=not grid.dry_run)
    names = datasets if datasets is not None else list(dataset.shifts if dataset else ())
    new = []
    if data.classes == "base":
        new = [EvalSet(f"{name}{NEW}", replace(data, classes="new", split_file=None))]
    if not names and not new:
        raise VlkrError(f"dataset {name!r} names no shifts; --datasets names what to measure on")
    source, *others = eval_sets([data, *(eval_only(other, data) for other in names)])
    return [source, *new, *others]


def transfer_report(results: GridResults, output: Path) -> Report:
    """Returns tables and plots of a transfer."""
    first = results.selected[0].entry
    place, names = first.place, first.sets
    rows: list[tuple[str, Place, Values]] = [
        (f"{name} (adapted to)" if i == 0 else name, place, methodcaller("values", name))
        for i, name in enumerate(names)
    ]
    if names[1].endswith(NEW):
        rows.insert(2, ("harmonic mean of base and new", place, _harmonic))
    if len(names) > 2:
        rows.append((f"mean of {len(names) - 1} others", place, SelectedRuns.shift_means))
    tables = [method_table(results, f"Adapted to {names[0]}, measured elsewhere", "top-1 %", rows)]
    zero_shot = (r for r in results.selected if r.results and r.results[0].cell.kind == "zero-shot")
    if before := next(zero_shot, None):
        tables.append(_change_table(results, before, place, names))
    bars = {name: partial(results.values, place=place, set_name=name) for name in names}

    def in_distribution(method: str, _: Place) -> list[float]:
        return bars[names[0]](method)

    def on_others(method: str, _: Place) -> list[float]:
        runs = results.at(method, place)
        return runs.shift_means() if runs else []

    against = partial(
        plot_shift,
        results,
        [place],
        in_distribution,
        on_others,
        (names[0], "mean of the others"),
    )
    calibration = partial(plot_calibration, results, place, names[0])
    pictures = [
        Picture("sets", "Accuracy by dataset", partial(plot_bars, results, bars)),
        Picture("home-against-others", "In-distribution against the others", against),
        Picture("reliability", f"Reliability on {names[0]}, first seed", calibration),
    ]
    differences = compare_to_reference(results, [place], lambda _: names)
    title = f"Transfer from {names[0]}"
    return standard_report(results, output, title, tables, pictures, differences)


def _harmonic(runs: SelectedRuns) -> list[float]:
    base, new = (runs.values(name) for name in runs.entry.sets[:2])
    return [base_to_new(a, b)["harmonic_mean"] for a, b in zip(base, new, strict=True)]


def _change_table(
    results: GridResults, before: SelectedRuns, place: Place, names: Sequence[str]
) -> Table:
    """Points by set and method, their mean over the other sets, and the largest loss there."""
    methods = []
    columns: list[list[str]] = []
    for method in results.methods:
        runs = results.at(method, place)
        if runs is None or runs is before:
            continue
        methods.append(method)
        each = {
            name: [value - before.values(name)[0] for value in runs.values(name)] for name in names
        }
        others = [each[name] for name in names[1:]]
        worst = min(names[1:], key=lambda name: statistics.mean(each[name]))
        columns.append(
            [
                *(mean_std(each[name]) for name in names),
                mean_std([statistics.mean(values) for values in zip(*others, strict=True)]),
                f"{mean_std(each[worst])} ({worst})",
            ]
        )
    labels = [*names, f"mean of {len(names) - 1} others", "least of the others"]
    rows = zip(labels, *columns, strict=True)
    note = "Points gained or, negative, forgotten: adapted less zero-shot, on the same images"
    return Table("Change against zero-shot", ("change, points", *methods), tuple(rows), note)
