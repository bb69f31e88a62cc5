"""Domain generalization: leave one domain out, for every domain, method and seed."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from vlkr.comparison.commands import Selection
from vlkr.comparison.compare import DIFFERENCES
from vlkr.comparison.figures import plot_bars, plot_calibration
from vlkr.comparison.grid import Method, candidate, grid_cells, resolved
from vlkr.comparison.options import GridOptions
from vlkr.comparison.outcomes import Collected, Outcome
from vlkr.comparison.plan import ZERO_SHOT, Candidate, Cell, Entry, EvalSet, Plan, Reading
from vlkr.comparison.report import Picture, Report
from vlkr.comparison.running import (
    Found,
    at_hand,
    base_context,
    data_name,
    found_context,
    run_grid,
)
from vlkr.comparison.tables import (
    Difference,
    Table,
    choice_note,
    choice_table,
    compare_to_reference,
    correct_pairs,
    cost_table,
    difference_table,
    mean_over,
    mean_row,
    method_table,
    paired,
    parameters_row,
    spread,
)
from vlkr.datasets import DataOptions
from vlkr.errors import VlkrError
from vlkr.reporting.statistics import paired_bootstrap

VALIDATION = "(validation)"
RULES = {
    "training-domain": "training-domain validation (held-out images of the training domains)",
    "leave-one-domain-out": "leave-one-domain-out validation (each training domain left out once)",
    "oracle": "oracle (held-out images of the test domain, which an honest choice cannot see)",
}


def run_dg(grid: GridOptions, output: Path, selection: Selection, holdout: float) -> Found:
    """What :func:`~vlkr.comparison.commands.dg` does."""
    if grid.data.test_fraction != DataOptions.test_fraction:
        raise VlkrError(
            f"data.test_fraction {grid.data.test_fraction} does not go with dg, whose holdout is "
            f"{holdout}"
        )
    data = replace(grid.data.absolute(), test_fraction=holdout)
    if data.val_fraction is None:
        data = replace(data, val_fraction=0.0)  # the held-out images validate, once a cell

    def plan() -> Plan:
        return dg_plan(grid, data, _domains(grid, data, selection), selection)

    return run_grid(grid, output, plan, lambda found: dg_report(found, output))


def _domains(grid: GridOptions, data: DataOptions, selection: Selection) -> list[str]:
    name = data_name(data)
    found = at_hand(data, needed=not grid.dry_run)
    domains = list(found.domains if found is not None else data.domains or ())
    least = 3 if selection == "leave-one-domain-out" else 2
    if found is None and not domains:
        raise VlkrError(f"{name} is not at hand; --data.domains names its domains for a dry run")
    if len(domains) < least:
        raise VlkrError(
            f"dataset {name!r} has {len(domains) or 'no'} domains, expected {least} or more as in "
            "<domain>/<class>/<image>"
        )
    return domains


def dg_plan(grid: GridOptions, data: DataOptions, domains: list[str], selection: Selection) -> Plan:
    """The cells of a domain generalization.

    Args:
        grid: options.
        data: the tree.
        domains: each is left out once.
        selection: the rule.
    """
    cells: list[Cell] = []
    entries: list[Entry] = []

    def on(name: str, chosen: list[str], split: str) -> EvalSet:
        return EvalSet(name, replace(data, domains=chosen), split)

    def without(left_out: tuple[str, ...], method: Method, sets: list[EvalSet]) -> Any:
        kept = [domain for domain in domains if domain not in left_out]
        where = ("without", *left_out)
        found = grid_cells(grid, method, where, replace(data, domains=kept), sets)
        cells.extend(cell for _, own in found for cell in own)
        return found

    for method in resolved(grid):
        if method.kind == ZERO_SHOT:
            sets = [on(domain, [domain], "train") for domain in domains]
            [(setting, own)] = grid_cells(grid, method, (data_name(data),), data, sets)
            cells += own
            entries += [
                Entry(method.label, {"domain": d}, (candidate(setting, own, None),), (d,))
                for d in domains
            ]
            continue
        pairs: dict[tuple[str, ...], list[tuple[dict[str, float], list[Cell]]]] = {}
        if selection == "leave-one-domain-out" and len(method.settings) > 1:
            for pair in combinations(domains, 2):
                pairs[pair] = without(pair, method, [on(d, [d], "train") for d in pair])
        for test in domains:
            others = [domain for domain in domains if domain != test]
            sets = [on(test, [test], "train")]
            if selection == "training-domain":
                sets.append(on(VALIDATION, others, "test"))
            elif selection == "oracle":
                sets.append(on(VALIDATION, [test], "test"))
            found = without((test,), method, sets)
            chosen = VALIDATION if selection != "leave-one-domain-out" else None
            candidates = [candidate(setting, own, chosen) for setting, own in found]
            if pairs:
                candidates = [replace(c, readings=_readings(c, test, pairs)) for c in candidates]
            entries.append(Entry(method.label, {"domain": test}, tuple(candidates), (test,)))
    shots = f"{data.shots}{' a domain' if data.per_domain else ''}"
    context = base_context(grid, "by the model selection per method and test domain") | {
        "dataset": data_name(data),
        "domains": " ".join(domains),
        **(
            {"shots": shots}
            if data.fraction is None
            else {"fraction of the training domains": data.fraction}
        ),
        "held out": f"{data.test_fraction:g} of each domain that has no split of its own",
        "split": "the test domain without its held-out images",
        "model selection": RULES[selection],
    }
    return Plan("dg", tuple(cells), tuple(entries), grid.reference, context)


def _readings(
    of: Candidate,
    test: str,
    pairs: dict[tuple[str, ...], list[tuple[dict[str, float], list[Cell]]]],
) -> tuple[Reading, ...]:
    """Accuracies on each training domain, of cells that saw neither it nor the test domain."""
    readings = []
    for pair, found in pairs.items():
        if test in pair:
            other = pair[1] if pair[0] == test else pair[0]
            own = next(cells for setting, cells in found if setting == of.setting)
            readings += [Reading(cell.id, other) for cell in own]
    return tuple(readings)


def dg_report(found: Collected, output: Path) -> Report:
    """Tables and plots of a domain generalization."""
    domains = list(dict.fromkeys(o.entry.place["domain"] for o in found.outcomes))
    places = [{"domain": domain} for domain in domains]
    rule = found.plan.context["model selection"]
    note = f"Model selection: {rule}; mean and standard deviation over seeds"
    table = method_table(
        found, "test domain, top-1 %", [(p["domain"], p, _on_test) for p in places]
    )
    table.insert(1, parameters_row(found))
    table.append(mean_row(found, f"mean of {len(domains)} domains", places, _on_test))
    worst = [spread(_worst(found, method, places)) for method in found.methods]
    table.append(["worst domain", *worst])
    tables = [Table(f"{found.plan.context['dataset']}, one domain left out", table, note)]
    differences = compare_to_reference(found, places, lambda place: [place["domain"]])
    differences += _mean_differences(found, places)
    if differences:
        rows = difference_table(differences, found.plan.reference)
        title = f"Difference to {found.plan.reference}"
        tables.append(Table(title, rows, f"{DIFFERENCES}. Model selection: {rule}"))
    tables.append(Table("Cost", cost_table(found), "Memory is the largest of a method's cells"))
    if choices := choice_table(found):
        note = f"{choice_note(found)}. Model selection: {rule}"
        tables.append(Table("Choice of settings", choices, note, brief=False))
    bars = {
        domain: partial(mean_over, found, places=[place], values=_on_test)
        for domain, place in zip(domains, places, strict=True)
    }
    bars["mean"] = partial(mean_over, found, places=places, values=_on_test)
    pictures = [
        Picture("domains", "Accuracy by test domain", lambda path: plot_bars(found, bars, path))
    ]
    pictures += [
        Picture(
            f"reliability-{domain}",
            f"Reliability on {domain}, first seed",
            partial(plot_calibration, found, place, domain),
        )
        for domain, place in zip(domains, places, strict=True)
        if found.has(place)
    ]
    title = f"Domain generalization on {found.plan.context['dataset']}"
    return Report(title, found_context(found), tables, pictures, differences, found, output)


def _on_test(outcome: Outcome) -> list[float]:
    return outcome.values(outcome.entry.sets[0])


def _worst(found: Collected, method: str, places: list[dict[str, Any]]) -> list[float]:
    """The lowest mean over seeds among domains, with the seeds that make it."""
    outcomes = [o for place in places if (o := found.at(method, place)) is not None]
    if len(outcomes) < len(places):
        return []
    return min((_on_test(o) for o in outcomes), key=statistics.mean)


def _mean_differences(found: Collected, places: list[dict[str, Any]]) -> list[Difference]:
    """The differences of the means over test domains."""
    differences = []
    for method in found.methods:
        sides = [
            (found.at(method, p), found.at(found.plan.reference, p), p["domain"]) for p in places
        ]
        if method == found.plan.reference or any(a is None or b is None for a, b, _ in sides):
            continue
        pairs = [(paired(a, b), name) for a, b, name in sides if a and b]
        counts = {len(pair) for pair, _ in pairs}
        if len(counts) > 1 or 0 in counts:
            continue
        each = [correct_pairs(pair, name) for pair, name in pairs]
        interval = paired_bootstrap([a.astype(int) - b for a, b in each])
        place = {"domain": "all"}
        text = f"mean of {len(places)} domains"
        differences.append(Difference(method, place, text, counts.pop(), interval, None))
    return differences
