"""From options to a report: the steps that all grids share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vlkr.comparison.engine import CellsDone, run_cells, run_plan
from vlkr.comparison.grid import Method, check_grid, resolved
from vlkr.comparison.options import GridOptions
from vlkr.comparison.outcomes import Collected, collect
from vlkr.comparison.plan import EvalSet, Plan
from vlkr.comparison.report import Report, write_report
from vlkr.datasets import DataOptions, Dataset
from vlkr.errors import VlkrError
from vlkr.files import resource

if TYPE_CHECKING:
    from vlkr.comparison.dry_run import DryRun

#: what a grid's command gives: the report, or what was asked for in its place.
Found: TypeAlias = "Report | CellsDone | DryRun"


def run_grid(
    grid: GridOptions,
    output: Path,
    make_plan: Callable[[], Plan],
    make_report: Callable[[Collected], Report],
) -> Found:
    """Plans, computes, collects and reports; or does the one part that the options ask for.

    Args:
        grid: options.
        output: folder of the grid.
        make_plan: gives the cells.
        make_report: makes tables and plots of what they found.

    Raises:
        VlkrError: for an option or a dataset that cannot be, before anything is written.
    """
    if grid.cell:
        return run_cells(output, grid.cell)
    check_grid(grid)
    plan = make_plan()
    if grid.dry_run:
        from vlkr.comparison.dry_run import dry_run

        return dry_run(plan)
    _check_data(plan)
    run_plan(plan, output, jobs=grid.jobs, launcher=grid.launcher, force=grid.force)
    report = make_report(collect(plan, output))
    write_report(report)
    return report


def _check_data(plan: Plan) -> None:
    seen = set()
    for cell in plan.cells:
        for chosen in cell.sets:
            key = repr(chosen)
            if key not in seen:
                chosen.load()
                seen.add(key)


def referred(reference: str, data: DataOptions) -> DataOptions:
    """The data options with another dataset: a card's name, a URL, or a path.

    Args:
        reference: as for :func:`~vlkr.datasets.load_dataset`.
        data: the other options.
    """
    is_card = resource(f"data/{reference}.yaml").is_file()
    if is_card or not Path(reference).exists():
        return replace(data, name=reference, root=None)
    return replace(data, name=None, root=Path(reference).resolve())


def elsewhere(reference: str, data: DataOptions) -> DataOptions:
    """Another dataset, to be measured on with the prompts of this one."""
    return referred(
        reference,
        DataOptions(
            templates=data.templates,
            test_fraction=data.test_fraction,
            num_workers=data.num_workers,
        ),
    )


def data_name(data: DataOptions) -> str:
    """A dataset's name in tables.

    Raises:
        VlkrError: if there is none.
    """
    if data.name is None and data.root is None:
        raise VlkrError("no dataset: give --data.name CARD or --data.root FOLDER")
    return data.label if data.root is None else data.root.name


def eval_sets(chosen: Sequence[DataOptions]) -> tuple[EvalSet, ...]:
    """Test splits to measure on, by their names.

    Raises:
        VlkrError: if two have one name.
    """
    sets = tuple(EvalSet(data_name(data), data) for data in chosen)
    names = [found.name for found in sets]
    for name in names:
        if names.count(name) > 1:
            raise VlkrError(f"two datasets are named {name!r}; rename one of the folders")
    return sets


def at_hand(data: DataOptions, *, needed: bool) -> Dataset | None:
    """The dataset, or what its card tells if it is not here and not needed; None without a card.

    Raises:
        VlkrError: if it is needed.
    """
    try:
        return data.load()
    except VlkrError:
        if needed:
            raise
        return data.described()


def base_context(grid: GridOptions, choice: str) -> dict[str, Any]:
    """What the numbers of every grid depend on, as far as it is known beforehand.

    Args:
        grid: options.
        choice: how learning rate and epochs are chosen, where there are several.
    """
    pretrained = {} if grid.pretrained is None else {"pretrained": grid.pretrained}
    trained = [method for method in resolved(grid) if method.kind == "adapter"]
    recipe = {
        "budget": grid.budget,
        "targets": " ".join(grid.targets),
        "towers": " ".join(grid.towers),
        **({} if grid.blocks is None else {"blocks": " ".join(map(str, grid.blocks))}),
        "batch size": grid.data.batch_size,
        "weight decay": grid.optimizer.weight_decay,
        "learning rate": _values(trained, "lr", choice),
        "epochs": _values(trained, "epochs", choice),
    }
    return {
        "model": grid.model,
        **pretrained,
        **(recipe if trained else {}),
        "seeds": " ".join(map(str, grid.seeds)),
        "checkpoint": "last iteration",
        "spread": "standard deviation over seeds",
    }


def _values(methods: Sequence[Method], key: str, choice: str) -> str:
    """What a setting is: a value, one for each method, or what is chosen from how."""
    values = {m.label: " ".join(dict.fromkeys(f"{s[key]:g}" for s in m.settings)) for m in methods}
    several = set(values.values())
    if any(" " in value for value in several):
        return choice
    if len(several) == 1:
        return several.pop()
    return ", ".join(f"{value} of {label}" for label, value in values.items())


def found_context(collected: Collected) -> dict[str, Any]:
    """The plan's context with what only the results tell: the weights' hash and the templates."""
    first = next(iter(collected.results.values())).found
    templates = {
        result["templates"]
        for found in collected.results.values()
        for result in found.found["results"]
    }
    context = {**collected.plan.context, "templates": "; ".join(sorted(templates))}
    return {
        "model": context.pop("model"),
        "weights": first["weights_sha256"][:12],
        **context,
    }
