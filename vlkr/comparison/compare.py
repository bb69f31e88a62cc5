"""Comparisons: methods over shots, seeds and learning rates, at a matched parameter count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import methodcaller
from pathlib import Path

from vlkr.comparison.dry_run import DryRun
from vlkr.comparison.engine import CellStates, run_grid
from vlkr.comparison.figures import (
    At,
    plot_bars,
    plot_calibration,
    plot_over_shots,
    plot_shift,
)
from vlkr.comparison.methods import base_context, resolve_methods
from vlkr.comparison.options import GridConfig
from vlkr.comparison.plan import (
    Cell,
    Entry,
    EvalSet,
    Place,
    Plan,
    check_unique,
    dataset_name,
    eval_only,
    eval_sets,
    grid_cells,
    load_or_describe,
    with_dataset,
)
from vlkr.comparison.report import Picture, Report, standard_report
from vlkr.comparison.results import GridResults, SelectedRuns
from vlkr.comparison.tables import Values, compare_to_reference, mean_over, mean_row, method_table
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.reporting.table import Table, mean_std


@dataclass(frozen=True)
class Source:
    """A dataset to adapt to, and the sets to evaluate on, its own test split first."""

    name: str
    data: DataConfig
    sets: tuple[EvalSet, ...]


def run_compare(
    grid: GridConfig,
    output: Path,
    *,
    datasets: list[str] | None = None,
    shifts: list[str] | None = None,
    shots: list[int] | None = None,
    spectra: bool = False,
) -> Report | CellStates | DryRun:
    """Compares methods in-distribution and under shift, with the uncertainty of differences.

    Args:
        grid: options.
        output: folder of the cells and of the report.
        datasets: card names or folders to adapt to, each on its own; ``grid.data`` by default.
        shifts: datasets under domain shift; those of the dataset's card by default.
        shots: training images per class; ``grid.data.shots`` by default.
        spectra: also show the spectra of what the adapters of the largest shots have learned.

    Raises:
        VlkrError: for any option that does not make sense, before anything is written; or if no
            cell could be computed.
    """
    for name in ("fraction", "split_file"):
        if (value := getattr(grid.data, name)) is not None:
            raise VlkrError(f"data.{name} {value} does not go with compare, which draws shots")
    numbers = shots if shots is not None else [grid.data.shots]
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise VlkrError(f"shots {numbers} is empty, repeats itself or has a number below 1")
    return run_grid(
        grid,
        output,
        lambda: compare_plan(grid, _sources(grid, datasets, shifts), sorted(numbers)),
        lambda results: compare_report(results, output, sorted(numbers), spectra),
    )


def _sources(
    grid: GridConfig, datasets: list[str] | None, shifts: list[str] | None
) -> list[Source]:
    chosen = [with_dataset(name, grid.data) for name in datasets] if datasets else [grid.data]
    if shifts and len(chosen) > 1:
        raise VlkrError("shifts go with one dataset, and there are several")
    sources = []
    for data in (options.absolute() for options in chosen):
        name = dataset_name(data)
        dataset = load_or_describe(data, needed=not grid.dry_run)
        names = shifts if shifts is not None else list(dataset.shifts if dataset else ())
        sources.append(Source(name, data, eval_sets([data, *(eval_only(n, data) for n in names)])))
    check_unique([source.name for source in sources])
    return sources


def compare_plan(grid: GridConfig, sources: Sequence[Source], shots: Sequence[int]) -> Plan:
    """Returns the cells of a comparison.

    Args:
        grid: options.
        sources: datasets to adapt to.
        shots: ascending.
    """
    cells: list[Cell] = []
    entries: list[Entry] = []
    for source in sources:
        names = tuple(eval_set.name for eval_set in source.sets)
        for method in resolve_methods(grid):
            for number in [0] if method.kind == "zero-shot" else shots:
                place: Place = {"dataset": source.name} | ({"shots": number} if number else {})
                data = replace(source.data, shots=number) if number else source.data
                where = (source.name, f"shots{number}") if number else (source.name,)
                settings = grid_cells(grid, method, where, data, source.sets)
                candidates = tuple(setting.candidate() for setting in settings)
                entries.append(Entry(method.label, place, candidates, names))
                cells += [cell for setting in settings for cell in setting.cells]
    choice = "by mean validation accuracy per method, dataset and shots"
    context = base_context(grid, choice) | {
        "datasets": " ".join(source.name for source in sources),
        "shots": " ".join(map(str, shots)),
        "split": "test",
    }
    return Plan("compare", tuple(cells), tuple(entries), grid.reference, context)


def compare_report(
    results: GridResults, output: Path, shots: Sequence[int], spectra: bool = False
) -> Report:
    """Returns tables and plots of a comparison."""
    sets = {runs.entry.place["dataset"]: runs.entry.sets for runs in results.selected}
    shifted = [dataset for dataset, names in sets.items() if len(names) > 1]

    def places(number: int, datasets: Sequence[str]) -> list[Place]:
        return [{"dataset": dataset, "shots": number} for dataset in datasets]

    def in_distribution(method: str, place: Place) -> list[float]:
        every = places(place["shots"], list(sets))
        return mean_over(results, method, every, SelectedRuns.first_set)

    def under_shift(method: str, place: Place) -> list[float]:
        every = places(place["shots"], shifted)
        return mean_over(results, method, every, SelectedRuns.shift_means)

    first, most = next(iter(sets)), shots[-1]
    name = first if len(sets) == 1 else f"mean of {len(sets)} datasets"
    panels: dict[str, At] = {name: in_distribution}
    if shifted:
        panels["mean of shifts"] = under_shift
    tables = [
        _accuracy_table(results, sets, number, places(number, list(sets)))
        for number in reversed(shots)
    ]
    pictures = []
    if len(shots) > 1:
        header = ("top-1 %", *(_shots(number) for number in shots))
        for title, at in panels.items():
            rows = tuple(
                (method, *(mean_std(at(method, {"shots": number})) for number in shots))
                for method in results.methods
            )
            tables.append(Table(f"Over shots, {title}", header, rows))
        draw = partial(plot_over_shots, results, shots, panels)
        pictures.append(Picture("shots", "Accuracy over shots", draw))
    pictures += _pictures(results, sets, panels, [{"shots": number} for number in shots])
    place = {"dataset": first, "shots": most}
    if any(results.at(method, place) for method in results.methods):
        title = f"Reliability on {first}, {most} shots, first seed"
        draw = partial(plot_calibration, results, place, first)
        pictures.append(Picture("reliability", title, draw))
    differences = compare_to_reference(
        results,
        [place for number in shots for place in places(number, list(sets))],
        lambda place: sets[place["dataset"]],
    )
    more_tables = []
    if spectra:
        spectrum_tables, spectrum_pictures = _spectra(results, place)
        more_tables += spectrum_tables
        pictures += spectrum_pictures
    return standard_report(
        results,
        output,
        f"Comparison on {', '.join(sets)}",
        tables,
        pictures,
        differences,
        main_differences=[d for d in differences if d.set == d.place["dataset"] or d.p is None],
        more_tables=more_tables,
    )


def _shots(number: int) -> str:
    return f"{number} shot{'s' * (number > 1)}"


def _accuracy_table(
    results: GridResults, sets: dict[str, tuple[str, ...]], number: int, places: list[Place]
) -> Table:
    rows: list[tuple[str, Place, Values]] = []
    for place in places:
        names = sets[place["dataset"]]
        for i, name in enumerate(names):
            label = f"{name} (in-distribution)" if i == 0 and len(names) > 1 else name
            rows.append((label, place, methodcaller("values", name)))
        if len(names) > 2:
            rows.append(("mean of shifts", place, SelectedRuns.shift_means))
            rows.append(("worst shift", place, SelectedRuns.worst_shifts))
    more = []
    if len(places) > 1:
        label = f"mean of {len(places)} datasets"
        more.append(mean_row(results, label, places, SelectedRuns.first_set))
    return method_table(results, f"Top-1 accuracy, {_shots(number)}", "top-1 %", rows, more)


def _pictures(
    results: GridResults,
    sets: dict[str, tuple[str, ...]],
    panels: dict[str, At],
    places: list[Place],
) -> list[Picture]:
    pictures = []
    if len(panels) > 1:
        (source, in_distribution), (shift, under_shift) = panels.items()
        draw = partial(
            plot_shift,
            results,
            places,
            in_distribution,
            under_shift,
            (source, shift),
        )
        pictures.append(Picture("home-against-shift", "In-distribution against shift", draw))
    most = places[-1]["shots"]
    bars = {
        name: partial(results.values, place={"dataset": dataset, "shots": most}, set_name=name)
        for dataset, names in sets.items()
        for name in names
    }
    draw = partial(plot_bars, results, bars)
    return [*pictures, Picture("sets", f"Accuracy by set, {most} shots", draw)]


def _spectra(results: GridResults, place: Place) -> tuple[list[Table], list[Picture]]:
    """Table and plot of the spectra of the first seed's adapters; none without adapters."""
    from vlkr.analysis.spectrum import RunSpectra, Spectra, model_spectra
    from vlkr.runs import RunFolder  # imports the models' libraries

    runs = []
    for method in results.methods:
        selected = results.at(method, place)
        if selected is None or selected.results[0].cell.kind != "adapter":
            continue
        folder = selected.results[0].folder.run
        layers = model_spectra(RunFolder.open(folder).load_model().model)
        if layers:
            runs.append(RunSpectra(str(folder), method, layers))
    if not runs:
        return [], []
    spectra = Spectra(runs, {})
    where = f"on {place['dataset']}, {place['shots']} shots"
    table = spectra.measure_table(f"Spectra {where}", brief=False)
    return [table], [Picture("spectra", f"Singular values {where}", spectra.plot_curves)]
