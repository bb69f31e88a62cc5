"""Comparisons: methods over shots, seeds and learning rates, at equal budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from vlkr.comparison.figures import (
    plot_bars,
    plot_calibration,
    plot_home_against_shift,
    plot_over_shots,
)
from vlkr.comparison.grid import candidate, grid_cells, resolved
from vlkr.comparison.options import GridOptions
from vlkr.comparison.outcomes import Collected, Outcome
from vlkr.comparison.plan import ZERO_SHOT, Cell, Entry, EvalSet, Plan
from vlkr.comparison.report import Picture, Report
from vlkr.comparison.running import (
    Found,
    at_hand,
    base_context,
    data_name,
    elsewhere,
    eval_sets,
    found_context,
    referred,
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
    mean_over,
    mean_row,
    method_table,
    parameters_row,
    spread,
    values_at,
)
from vlkr.datasets import DataOptions
from vlkr.errors import VlkrError

Place = dict[str, Any]
DIFFERENCES = (
    "Paired by seed and by image; interval: bootstrap over seeds and images, 10,000 draws; p: "
    "McNemar's exact test, over several seeds twice their median"
)


@dataclass(frozen=True)
class Home:
    """A dataset to adapt to, and the sets that it is measured on, its own test split first."""

    name: str
    data: DataOptions
    sets: tuple[EvalSet, ...]


def run_compare(
    grid: GridOptions,
    output: Path,
    datasets: list[str] | None,
    shifts: list[str] | None,
    shots: list[int] | None,
    spectra: bool,
) -> Found:
    """What :func:`~vlkr.comparison.commands.compare` does."""
    for name in ("fraction", "split_file"):
        if (value := getattr(grid.data, name)) is not None:
            raise VlkrError(f"data.{name} {value} does not go with compare, which draws shots")
    numbers = shots if shots is not None else [grid.data.shots]
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise VlkrError(f"shots {numbers} is empty, repeats itself or has a number below 1")

    def plan() -> Plan:
        return compare_plan(grid, _homes(grid, datasets, shifts), sorted(numbers))

    return run_grid(
        grid, output, plan, lambda found: compare_report(found, output, sorted(numbers), spectra)
    )


def _homes(grid: GridOptions, datasets: list[str] | None, shifts: list[str] | None) -> list[Home]:
    given = [referred(name, grid.data) for name in datasets] if datasets else [grid.data]
    if shifts and len(given) > 1:
        raise VlkrError("shifts go with one dataset, and there are several")
    homes = []
    for data in given:
        data = data.absolute()
        name = data_name(data)
        found = at_hand(data, needed=not grid.dry_run)
        names = shifts if shifts is not None else list(found.shifts if found else ())
        homes.append(Home(name, data, eval_sets([data, *(elsewhere(n, data) for n in names)])))
    for home in homes:
        if sum(home.name == other.name for other in homes) > 1:
            raise VlkrError(f"two datasets are named {home.name!r}; rename one of the folders")
    return homes


def compare_plan(grid: GridOptions, homes: list[Home], shots: list[int]) -> Plan:
    """The cells of a comparison.

    Args:
        grid: options.
        homes: datasets to adapt to.
        shots: ascending.
    """
    cells: list[Cell] = []
    entries: list[Entry] = []
    for home in homes:
        names = tuple(chosen.name for chosen in home.sets)
        for method in resolved(grid):
            for number in [0] if method.kind == ZERO_SHOT else shots:
                place: Place = {"dataset": home.name} | ({"shots": number} if number else {})
                data = replace(home.data, shots=number) if number else home.data
                where = (home.name, f"shots{number}") if number else (home.name,)
                found = grid_cells(grid, method, where, data, list(home.sets))
                entries.append(
                    Entry(
                        method.label,
                        place,
                        tuple(candidate(setting, own, None) for setting, own in found),
                        names,
                    )
                )
                cells += [cell for _, own in found for cell in own]
    choice = "by mean validation accuracy per method, dataset and shots"
    context = base_context(grid, choice) | {
        "datasets": " ".join(home.name for home in homes),
        "shots": " ".join(map(str, shots)),
        "split": "test",
    }
    return Plan("compare", tuple(cells), tuple(entries), grid.reference, context)


def compare_report(
    found: Collected, output: Path, shots: list[int], spectra: bool = False
) -> Report:
    """Tables and plots of a comparison."""
    sets = {o.entry.place["dataset"]: o.entry.sets for o in found.outcomes}
    shifted = [dataset for dataset, names in sets.items() if len(names) > 1]
    most = shots[-1]

    def places(number: int, of: list[str] | None = None) -> list[Place]:
        return [{"dataset": d, "shots": number} for d in (sets if of is None else of)]

    def home(method: str, place: Place) -> list[float]:
        return mean_over(found, method, places(place["shots"]), _home)

    def shift(method: str, place: Place) -> list[float]:
        return mean_over(found, method, places(place["shots"], shifted), Outcome.shift_means)

    tables = [_by_set(found, sets, number, places(number)) for number in reversed(shots)]
    panels = {_home_title(list(sets)): home}
    if shifted:
        panels["mean of shifts"] = shift
    if len(shots) > 1:
        header = ["top-1 %", *(f"{n} shot{'s' * (n > 1)}" for n in shots)]
        for title, at in panels.items():
            rows = [[m, *(spread(at(m, {"shots": n})) for n in shots)] for m in found.methods]
            tables.append(Table(f"Over shots, {title}", [header, *rows]))
    every = [place for number in shots for place in places(number)]
    differences = compare_to_reference(found, every, lambda place: sets[place["dataset"]])
    shown = [d for d in differences if d.set == d.place["dataset"] or d.p is None]
    if shown:
        rows = difference_table(shown, found.plan.reference)
        tables.append(Table(f"Difference to {found.plan.reference}", rows, DIFFERENCES))
    tables.append(Table("Cost", cost_table(found), "Memory is the largest of a method's cells"))
    if choices := choice_table(found):
        tables.append(Table("Choice of settings", choices, choice_note(found), brief=False))
    if len(differences) > len(shown):
        rows = difference_table(differences, found.plan.reference)
        tables.append(Table("Differences, set by set", rows, DIFFERENCES, brief=False))
    pictures = _pictures(found, sets, shots, panels, most)
    if spectra:
        from vlkr.comparison.spectra import spectra_parts  # which loads the runs' models

        more_tables, more_pictures = spectra_parts(found, most)
        tables += more_tables
        pictures += more_pictures
    title = f"Comparison on {', '.join(sets)}"
    return Report(title, found_context(found), tables, pictures, differences, found, output)


def _pictures(
    found: Collected,
    sets: dict[str, tuple[str, ...]],
    shots: list[int],
    panels: Mapping[str, Callable[[str, Place], list[float]]],
    most: int,
) -> list[Picture]:
    every: list[Place] = [{"shots": number} for number in shots]
    first = next(iter(sets))
    place = {"dataset": first, "shots": most}
    pictures = []
    if len(shots) > 1:
        pictures.append(
            Picture(
                "shots",
                "Accuracy over shots",
                lambda path: plot_over_shots(found, shots, panels, path),
            )
        )
    if len(panels) > 1:
        (home, at_home), (shift, under_shift) = panels.items()
        pictures.append(
            Picture(
                "home-against-shift",
                "Home against shift",
                lambda path: plot_home_against_shift(
                    found, every, at_home, under_shift, (home, shift), path
                ),
            )
        )
    bars = {
        name: partial(values_at, found, place={"dataset": dataset, "shots": most}, name=name)
        for dataset, names in sets.items()
        for name in names
    }
    pictures.append(
        Picture(
            "sets",
            f"Accuracy by set, {most} shots",
            lambda path: plot_bars(found, bars, path),
        )
    )
    if found.has(place):
        pictures.append(
            Picture(
                "reliability",
                f"Reliability on {first}, {most} shots, first seed",
                lambda path: plot_calibration(found, place, first, path),
            )
        )
    return pictures


def _by_set(
    found: Collected, sets: dict[str, tuple[str, ...]], number: int, places: list[Place]
) -> Table:
    rows: list[tuple[str, Place, Values]] = []
    for place in places:
        names = sets[place["dataset"]]
        for i, name in enumerate(names):
            label = f"{name} (home)" if i == 0 and len(names) > 1 else name
            rows.append((label, place, methodcaller("values", name)))
        if len(names) > 2:
            rows.append(("mean of shifts", place, Outcome.shift_means))
            rows.append(("worst shift", place, Outcome.worst_shifts))
    table = method_table(found, "top-1 %", rows)
    table.insert(1, parameters_row(found))
    if len(places) > 1:
        table.append(mean_row(found, f"mean of {len(places)} datasets", places, _home))
    return Table(f"Top-1 accuracy, {number} shot{'s' * (number > 1)}", table)


def _home(outcome: Outcome) -> list[float]:
    return outcome.values(outcome.entry.sets[0])


def _home_title(datasets: list[str]) -> str:
    return datasets[0] if len(datasets) == 1 else f"mean of {len(datasets)} datasets"
