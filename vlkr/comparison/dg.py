"""Domain generalization: leave one domain out, for every domain, method and seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

from vlkr.comparison.dry_run import DryRun
from vlkr.comparison.engine import CellStates, run_grid
from vlkr.comparison.figures import plot_bars, plot_calibration
from vlkr.comparison.methods import Method, base_context, resolve_methods
from vlkr.comparison.options import GridConfig, Selection
from vlkr.comparison.plan import (
    Candidate,
    Cell,
    Entry,
    EvalSet,
    Place,
    Plan,
    Reading,
    SettingCells,
    dataset_name,
    grid_cells,
    load_or_describe,
)
from vlkr.comparison.report import Picture, Report, standard_report
from vlkr.comparison.results import GridResults, SelectedRuns
from vlkr.comparison.tables import (
    compare_to_reference,
    mean_difference,
    mean_over,
    mean_row,
    method_table,
)
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.reporting.table import mean_std

VALIDATION = "(validation)"
RULES: dict[Selection, str] = {
    "training-domain": "training-domain validation (held-out images of the training domains)",
    "leave-one-domain-out": "leave-one-domain-out validation (each training domain left out once)",
    "oracle": "oracle (held-out images of the test domain, which an honest choice cannot see)",
}


def run_dg(
    grid: GridConfig,
    output: Path,
    *,
    selection: Selection = "training-domain",
    holdout: float = 0.2,
) -> Report | CellStates | DryRun:
    """Adapts to all domains but one, and tests on that one, in turn.

    Args:
        grid: options; ``data`` is a tree of domains.
        output: folder of the cells and of the report.
        selection: the images by which settings are chosen.
        holdout: fraction of each domain that is held out.

    Raises:
        VlkrError: for a dataset without domains, or any option that does not make sense, before
            anything is written.
    """
    if grid.data.test_fraction != DataConfig.test_fraction:
        raise VlkrError(
            f"data.test_fraction {grid.data.test_fraction} does not go with dg, whose holdout is "
            f"{holdout}"
        )
    data = replace(grid.data.absolute(), test_fraction=holdout)
    if data.val_fraction is None:
        data = replace(data, val_fraction=0.0)  # the held-out images validate, once per cell
    return run_grid(
        grid,
        output,
        lambda: dg_plan(grid, data, _domains(grid, data, selection), selection),
        lambda results: dg_report(results, output),
    )


def _domains(grid: GridConfig, data: DataConfig, selection: Selection) -> list[str]:
    name = dataset_name(data)
    dataset = load_or_describe(data, needed=not grid.dry_run)
    domains = list(dataset.domains if dataset is not None else data.domains or ())
    least = 3 if selection == "leave-one-domain-out" else 2
    if dataset is None and not domains:
        raise VlkrError(f"{name} is not at hand; --data.domains names its domains for a dry run")
    if len(domains) < least:
        raise VlkrError(
            f"dataset {name!r} has {len(domains) or 'no'} domains, expected {least} or more as in "
            "<domain>/<class>/<image>"
        )
    return domains


def dg_plan(
    grid: GridConfig, data: DataConfig, domains: Sequence[str], selection: Selection
) -> Plan:
    """Returns the cells of a domain generalization.

    Args:
        grid: options.
        data: the tree.
        domains: each is left out once.
        selection: the images by which settings are chosen.
    """
    cells: list[Cell] = []
    entries: list[Entry] = []

    def images_of(name: str, kept: Sequence[str], split: str) -> EvalSet:
        return EvalSet(name, replace(data, domains=list(kept)), split)

    def without(
        left_out: tuple[str, ...], method: Method, sets: list[EvalSet]
    ) -> list[SettingCells]:
        kept = [domain for domain in domains if domain not in left_out]
        settings = grid_cells(
            grid, method, ("without", *left_out), replace(data, domains=kept), sets
        )
        cells.extend(cell for setting in settings for cell in setting.cells)
        return settings

    for method in resolve_methods(grid):
        if method.kind == "zero-shot":
            sets = [images_of(domain, [domain], "train") for domain in domains]
            [setting] = grid_cells(grid, method, (dataset_name(data),), data, sets)
            cells += setting.cells
            zero_shot = (setting.candidate(),)
            entries += [Entry(method.label, {"domain": d}, zero_shot, (d,)) for d in domains]
            continue
        pairs: dict[tuple[str, ...], list[SettingCells]] = {}
        if selection == "leave-one-domain-out" and len(method.settings) > 1:
            for pair in combinations(domains, 2):
                pairs[pair] = without(pair, method, [images_of(d, [d], "train") for d in pair])
        for test in domains:
            sets = [images_of(test, [test], "train")]
            if selection == "training-domain":
                others = [domain for domain in domains if domain != test]
                sets.append(images_of(VALIDATION, others, "test"))
            elif selection == "oracle":
                sets.append(images_of(VALIDATION, [test], "test"))
            validation = None if selection == "leave-one-domain-out" else VALIDATION
            candidates = tuple(
                setting.candidate(validation) for setting in without((test,), method, sets)
            )
            if pairs:
                candidates = tuple(_read_from_pairs(c, test, pairs) for c in candidates)
            entries.append(Entry(method.label, {"domain": test}, candidates, (test,)))
    context = base_context(grid, "by the model selection per method and test domain") | {
        "dataset": dataset_name(data),
        "domains": " ".join(domains),
        **(
            {"shots": f"{data.shots}{' a domain' if data.per_domain else ''}"}
            if data.fraction is None
            else {"fraction of the training domains": data.fraction}
        ),
        "held out": f"{data.test_fraction:g} of each domain that has no split of its own",
        "split": "the test domain without its held-out images",
        "model selection": RULES[selection],
    }
    return Plan("dg", tuple(cells), tuple(entries), grid.reference, context)


def _read_from_pairs(
    candidate: Candidate, test: str, pairs: dict[tuple[str, ...], list[SettingCells]]
) -> Candidate:
    """Chooses by accuracies on each training domain of cells that saw neither it nor ``test``."""
    readings = []
    for pair, settings in pairs.items():
        if test in pair:
            [left_out] = {*pair} - {test}
            own = next(s.cells for s in settings if s.setting == candidate.setting)
            readings += [Reading(cell.id, left_out) for cell in own]
    return replace(candidate, readings=tuple(readings))


def dg_report(results: GridResults, output: Path) -> Report:
    """Returns tables and plots of a domain generalization."""
    domains = list(dict.fromkeys(runs.entry.place["domain"] for runs in results.selected))
    places: list[Place] = [{"domain": domain} for domain in domains]
    context = results.plan.context
    selection, dataset = f"Model selection: {context['model selection']}", context["dataset"]
    mean = f"mean of {len(domains)} domains"
    on_test = SelectedRuns.first_set
    table = method_table(
        results,
        f"{dataset}, one domain left out",
        "test domain, top-1 %",
        [(place["domain"], place, on_test) for place in places],
        [
            mean_row(results, mean, places, on_test),
            ("worst domain", *(mean_std(_worst(results, m, places)) for m in results.methods)),
        ],
        f"{selection}; mean and standard deviation over seeds",
    )
    differences = compare_to_reference(results, places, lambda place: [place["domain"]])
    for method in results.methods:
        if difference := mean_difference(results, method, places, {"domain": "all"}, mean):
            differences.append(difference)
    bars = {
        place["domain"]: partial(mean_over, results, places=[place], values=on_test)
        for place in places
    }
    bars["mean"] = partial(mean_over, results, places=places, values=on_test)
    pictures = [Picture("domains", "Accuracy by test domain", partial(plot_bars, results, bars))]
    for domain, place in zip(domains, places, strict=True):
        if any(results.at(method, place) for method in results.methods):
            title = f"Reliability on {domain}, first seed"
            draw = partial(plot_calibration, results, place, domain)
            pictures.append(Picture(f"reliability-{domain}", title, draw))
    title = f"Domain generalization on {dataset}"
    return standard_report(
        results, output, title, [table], pictures, differences, note=f". {selection}"
    )


def _worst(results: GridResults, method: str, places: Sequence[Place]) -> list[float]:
    """The domain with the lowest mean over seeds, one value per seed."""
    runs = [r for place in places if (r := results.at(method, place)) is not None]
    if len(runs) < len(places):
        return []
    return min((r.first_set() for r in runs), key=statistics.mean)
