"""The tables of a grid, and the differences of its methods to the reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlkr.comparison.plan import Place
from vlkr.comparison.results import CellResult, GridResults, SelectedRuns
from vlkr.errors import VlkrError
from vlkr.reporting.statistics import Interval, combined_p, mcnemar, paired_bootstrap
from vlkr.reporting.table import Table, mean_std, value_range

Values = Callable[[SelectedRuns], list[float]]


def method_table(
    results: GridResults,
    title: str,
    corner: str,
    rows: Sequence[tuple[str, Place, Values]],
    more: Sequence[tuple[str, ...]] = (),
    note: str = "",
) -> Table:
    """Returns a table with a column per method: mean and standard deviation over seeds.

    Args:
        results: of the grid.
        title: above it.
        corner: the header's first cell.
        rows: label, place in the grid and what to show of a method's runs there.
        more: complete rows after these.
        note: below it.
    """
    cells = [_parameters_row(results)]
    for label, place, values in rows:
        runs = [results.at(method, place) for method in results.methods]
        cells.append((label, *(mean_std(values(r)) if r else "" for r in runs)))
    return Table(title, (corner, *results.methods), (*cells, *more), note)


def mean_row(
    results: GridResults, label: str, places: Sequence[Place], values: Values
) -> tuple[str, ...]:
    """Returns the means over places, seed by seed; empty for a method that lacks one of them."""
    return (label, *(mean_std(mean_over(results, m, places, values)) for m in results.methods))


def mean_over(
    results: GridResults, method: str, places: Sequence[Place], values: Values
) -> list[float]:
    """Returns a method's mean over places, one value per seed that it has in all of them."""
    runs = [results.at(method, place) for place in places]
    if not runs or any(r is None for r in runs):
        return []
    by_seed = [dict(zip(r.seeds, values(r), strict=True)) for r in runs if r is not None]
    common = [seed for seed in by_seed[0] if all(seed in place for place in by_seed)]
    return [statistics.mean(place[seed] for place in by_seed) for seed in common]


def _parameters_row(results: GridResults) -> tuple[str, ...]:
    return ("trained parameters", *(_parameters(results, method) for method in results.methods))


def _parameters(results: GridResults, method: str) -> str:
    runs = [r for selected in results.of_method(method) for r in selected.results]
    return value_range({result.record["parameters"] for result in runs})


@dataclass(frozen=True)
class Difference:
    """How much better a method is than the reference, in fractions.

    Attributes:
        method: label.
        place: where in the grid.
        set: name, or ``mean`` of several.
        seeds: number of seeds that both have.
        interval: mean difference of top-1 accuracies and its 95 % bootstrap interval.
        p: McNemar's exact p-value, None for a mean of sets.
    """

    method: str
    place: Place
    set: str
    seeds: int
    interval: Interval
    p: float | None

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def compare_to_reference(
    results: GridResults,
    places: Sequence[Place],
    set_names: Callable[[Place], Sequence[str]],
) -> list[Difference]:
    """Returns paired differences of every method to the reference, by set and on average.

    Args:
        results: of the grid.
        places: in the grid.
        set_names: the sets of a place; of three or more the mean over those after the first is
            compared too.
    """
    differences = []
    for place in places:
        reference = results.at(results.plan.reference, place)
        for method in results.methods:
            runs = results.at(method, place)
            if runs is None or reference is None or runs is reference:
                continue
            pairs = paired_by_seed(runs, reference)
            if not pairs:
                continue
            shifts = []
            for i, name in enumerate(set_names(place)):
                ours, theirs = correct_by_seed(pairs, name)
                p = combined_p([mcnemar(a, b) for a, b in zip(ours, theirs, strict=True)])
                difference = ours.astype(np.int8) - theirs.astype(np.int8)
                shifts += [difference] if i else []
                interval = paired_bootstrap([difference])
                differences.append(Difference(method, place, name, len(pairs), interval, p))
            if len(shifts) > 1:
                interval = paired_bootstrap(shifts)
                name = f"mean of {len(shifts)} shifts"
                differences.append(Difference(method, place, name, len(pairs), interval, None))
    return differences


def mean_difference(
    results: GridResults, method: str, places: Sequence[Place], place: Place, name: str
) -> Difference | None:
    """Returns the difference of a method to the reference in the mean over places.

    Args:
        results: of the grid.
        method: compared with the reference.
        places: each with its own first set.
        place: of the difference.
        name: of the difference's set.

    Returns:
        None for the reference itself, or where the two do not share the same number of seeds.
    """
    each = []
    for part in places:
        ours, theirs = results.at(method, part), results.at(results.plan.reference, part)
        if method == results.plan.reference or ours is None or theirs is None:
            return None
        each.append((paired_by_seed(ours, theirs), ours.entry.sets[0]))
    counts = {len(pairs) for pairs, _ in each}
    if len(counts) > 1 or 0 in counts:
        return None
    correct = [correct_by_seed(pairs, set_name) for pairs, set_name in each]
    interval = paired_bootstrap([a.astype(np.int8) - b.astype(np.int8) for a, b in correct])
    return Difference(method, place, name, counts.pop(), interval, None)


def paired_by_seed(ours: SelectedRuns, theirs: SelectedRuns) -> list[tuple[CellResult, CellResult]]:
    """Returns pairs of results with the same seed; what has no seed goes with every one."""
    a, b = (dict(zip(runs.seeds, runs.results, strict=True)) for runs in (ours, theirs))
    if None in b and None not in a:
        return [(result, b[None]) for result in a.values()]
    return [(a.get(seed) or a[None], b[seed]) for seed in b if seed in a or None in a]


def correct_by_seed(
    pairs: Iterable[tuple[CellResult, CellResult]], set_name: str
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Returns whether each side is correct, ``(num_seeds, num_images)``.

    Raises:
        VlkrError: if the two were evaluated on different images.
    """
    sides: tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]]] = ([], [])
    keys = set()
    for pair in pairs:
        for side, result in zip(sides, pair, strict=True):
            predictions = result.predictions(set_name)
            side.append(predictions.correct)
            keys.add(predictions.keys)
    if len(keys) > 1:
        raise VlkrError(
            f"cells were evaluated on different images of {set_name!r}; compute them again"
        )
    return np.stack(sides[0]), np.stack(sides[1])


def difference_table(
    differences: Sequence[Difference], reference: str, title: str, note: str, brief: bool = True
) -> Table:
    """Returns differences in points, with their intervals and p-values."""
    keys = [
        key
        for key in dict.fromkeys(key for d in differences for key in d.place)
        if len({d.place.get(key) for d in differences}) > 1
    ]
    rows = [
        (
            d.method,
            *(str(d.place.get(key, "")) for key in keys),
            d.set,
            f"{100 * d.interval.mean:+.1f}",
            f"{100 * d.interval.low:+.1f} to {100 * d.interval.high:+.1f}",
            p_value(d.p),
        )
        for d in differences
    ]
    header = ("method", *keys, "set", f"points above {reference}", "95 % interval", "p")
    return Table(title, header, tuple(rows), note, brief)


def p_value(p: float | None) -> str:
    """Returns a p-value as tables show it.

    >>> p_value(0.0402), p_value(1e-9), p_value(None)
    ('0.040', '<0.001', '')
    """
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def cost_table(results: GridResults) -> Table:
    """Returns what a cell of each method costs: means over its cells, and the largest memory."""
    header = ("method", "parameters", "training images", "cells", "training s", "whole cell s")
    rows = []
    for method in results.methods:
        candidates = (c for runs in results.of_method(method) for c in runs.entry.candidates)
        ids = {cell for candidate in candidates for cell in candidate.cells}
        records = [results.cells[cell].record for cell in ids if cell in results.cells]
        memory = [r["peak_memory_mib"] for r in records if r["peak_memory_mib"] is not None]
        images = {r["train_images"] for r in records if r.get("train_images") is not None}
        seconds = (
            f"{statistics.mean(r[key] for r in records):.1f}" if records else ""
            for key in ("train_seconds", "seconds")
        )
        rows.append(
            (
                method,
                _parameters(results, method),
                value_range(images),
                f"{len(records)} of {len(ids)}",
                *seconds,
                f"{max(memory):,.0f}" if memory else "",
            )
        )
    note = "Memory is the largest of a method's cells"
    return Table("Cost", (*header, "peak memory MiB"), tuple(rows), note)


def choice_table(results: GridResults, note: str = "") -> Table | None:
    """Returns mean validation accuracies of all settings, or None without a choice.

    Args:
        results: of the grid.
        note: more to say below the table.
    """
    entries = [runs for runs in results.selected if len(runs.entry.candidates) > 1]
    if not entries:
        return None
    places = list(dict.fromkeys(key for runs in entries for key in runs.entry.place))
    settings = dict.fromkeys(
        _setting(candidate.setting) for runs in entries for candidate in runs.entry.candidates
    )
    rows = []
    at_ends: dict[str, None] = {}
    for runs in entries:
        entry, texts = runs.entry, {}
        for candidate, score in zip(entry.candidates, runs.scores, strict=True):
            mark = " *" if candidate is runs.chosen else ""
            text = "?" if score is None else f"{100 * score:.1f}"
            texts[_setting(candidate.setting)] = f"{text}{mark}"
        place = (str(entry.place.get(key, "")) for key in places)
        rows.append((entry.method, *place, *(texts.get(setting, "") for setting in settings)))
        rates = {c.setting["lr"] for c in entry.candidates if "lr" in c.setting}
        if len(rates) > 1 and runs.chosen and runs.chosen.setting["lr"] in (min(rates), max(rates)):
            at_ends[entry.method] = None
    about = "Mean validation accuracy over seeds in percent, * the chosen setting"
    if at_ends:
        about += "; at an end of the learning rates, beyond which others may do better: "
        about += ", ".join(at_ends)
    header = ("method", *places, *settings)
    return Table("Choice of settings", header, tuple(rows), f"{about}{note}", brief=False)


def _setting(setting: dict[str, float]) -> str:
    return " ".join(f"{key} {value:g}" for key, value in setting.items())


def failure_table(results: GridResults) -> Table | None:
    """Returns cells that failed or are not finished, or None if there are none."""
    rows = [*results.failures.items(), *((cell, "not finished") for cell in results.unfinished)]
    return Table("Failed or not finished", ("cell", "what happened"), tuple(rows)) if rows else None
