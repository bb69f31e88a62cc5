"""The tables of a grid, as rows of cells whose first row is the header."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlkr.comparison.outcomes import Collected, Outcome, Result
from vlkr.errors import VlkrError
from vlkr.reporting.statistics import Interval, combined_p, mcnemar, paired_bootstrap

Values = Callable[[Outcome], list[float]]


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: above it.
        rows: cells, the header first.
        note: below it.
        brief: also shown in the terminal.
    """

    title: str
    rows: list[list[str]]
    note: str = ""
    brief: bool = True


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
    place: dict[str, Any]
    set: str
    seeds: int
    interval: Interval
    p: float | None

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean and, over several values, standard deviation; in percent by default.

    >>> spread([0.5, 0.7]), spread([0.5]), spread([])
    ('60.0 ± 14.1', '50.0', '')
    """
    if not values:
        return ""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def method_table(
    collected: Collected, corner: str, rows: Sequence[tuple[str, dict[str, Any], Values]]
) -> list[list[str]]:
    """Rows of values, a column a method: mean and standard deviation over seeds.

    Args:
        collected: the grid's outcomes.
        corner: the header's first cell.
        rows: label, place in the grid and what to take there from a method's outcome.
    """
    table = [[corner, *collected.methods]]
    for label, place, values in rows:
        found = [collected.at(method, place) for method in collected.methods]
        table.append([label, *(spread(values(o)) if o else "" for o in found)])
    return table


def mean_row(
    collected: Collected, label: str, places: Sequence[dict[str, Any]], values: Values
) -> list[str]:
    """The mean over places, seed by seed; empty for a method that lacks one of them."""
    return [label, *(spread(mean_over(collected, m, places, values)) for m in collected.methods)]


def mean_over(
    collected: Collected, method: str, places: Sequence[dict[str, Any]], values: Values
) -> list[float]:
    """A method's mean over places, one a seed that it has in all of them."""
    found = [collected.at(method, place) for place in places]
    if not found or any(outcome is None for outcome in found):
        return []
    by_seed = [dict(zip(o.seeds, values(o), strict=True)) for o in found if o is not None]
    common = [seed for seed in by_seed[0] if all(seed in other for other in by_seed)]
    return [statistics.mean(other[seed] for other in by_seed) for seed in common]


def values_at(collected: Collected, method: str, place: dict[str, Any], name: str) -> list[float]:
    """A method's top-1 accuracy on a set in a place, one a seed; empty if it is not known."""
    outcome = collected.at(method, place)
    return outcome.values(name) if outcome else []


def parameters_row(collected: Collected, label: str = "trained parameters") -> list[str]:
    """Trained parameters by method, the least and the largest of its outcomes."""
    cells = []
    for method in collected.methods:
        numbers = {
            result.found["parameters"]
            for outcome in collected.outcomes
            if outcome.entry.method == method
            for result in outcome.results
        }
        cells.append(_range(numbers))
    return [label, *cells]


def compare_to_reference(
    collected: Collected,
    places: Sequence[dict[str, Any]],
    names: Callable[[dict[str, Any]], Sequence[str]],
) -> list[Difference]:
    """Paired differences of every method to the reference, set by set and in the mean.

    Args:
        collected: the grid's outcomes.
        places: in the grid.
        names: the sets of a place; of three or more the mean over those after the first is
            compared too.
    """
    found = []
    for place in places:
        reference = collected.at(collected.plan.reference, place)
        if reference is None:
            continue
        for method in collected.methods:
            outcome = collected.at(method, place)
            if outcome is None or outcome is reference:
                continue
            pairs = paired(outcome, reference)
            if not pairs:
                continue
            each = {name: correct_pairs(pairs, name) for name in names(place)}
            for name, (first, second) in each.items():
                p = combined_p([mcnemar(a, b) for a, b in zip(first, second, strict=True)])
                interval = paired_bootstrap([_minus(first, second)])
                found.append(Difference(method, place, name, len(pairs), interval, p))
            shifts = [_minus(*each[name]) for name in list(each)[1:]]
            if len(shifts) > 1:
                interval = paired_bootstrap(shifts)
                text = f"mean of {len(shifts)} shifts"
                found.append(Difference(method, place, text, len(pairs), interval, None))
    return found


def paired(first: Outcome, second: Outcome) -> list[tuple[Result, Result]]:
    """Results of the seeds that both have; what has no seed goes with every one."""
    a, b = (dict(zip(o.seeds, o.results, strict=True)) for o in (first, second))
    seeds = [seed for seed in b if seed in a or None in a]
    if None in b and None not in a:
        return [(result, b[None]) for result in a.values()]
    return [(a.get(seed) or a[None], b[seed]) for seed in seeds]


def correct_pairs(
    pairs: Iterable[tuple[Result, Result]], name: str
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where each side is right, ``(num_seeds, num_images)``.

    Raises:
        VlkrError: if the two were measured on other images.
    """
    sides: tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]]] = ([], [])
    keys = set()
    for pair in pairs:
        for side, result in zip(sides, pair, strict=True):
            said = result.said(name)
            side.append(said.correct)
            keys.add(said.keys)
    if len(keys) > 1:
        raise VlkrError(f"cells were measured on other images of {name!r}; compute them again")
    return np.stack(sides[0]), np.stack(sides[1])


def _minus(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> NDArray[np.integer]:
    return first.astype(np.int8) - second.astype(np.int8)


def difference_table(differences: Sequence[Difference], reference: str) -> list[list[str]]:
    """Differences in points, with their intervals and p-values."""
    keys = [
        key
        for key in dict.fromkeys(key for d in differences for key in d.place)
        if len({d.place.get(key) for d in differences}) > 1
    ]
    header = ["method", *keys, "set", f"points above {reference}", "95 % interval", "p"]
    return [
        header,
        *(
            [
                d.method,
                *(str(d.place.get(key, "")) for key in keys),
                d.set,
                f"{100 * d.interval.mean:+.1f}",
                f"{100 * d.interval.low:+.1f} to {100 * d.interval.high:+.1f}",
                p_value(d.p),
            ]
            for d in differences
        ),
    ]


def p_value(p: float | None) -> str:
    """A p-value as tables show it.

    >>> p_value(0.0402), p_value(1e-9), p_value(None)
    ('0.040', '<0.001', '')
    """
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _range(numbers: Collection[int]) -> str:
    return " to ".join(f"{n:,}" for n in sorted({min(numbers), max(numbers)})) if numbers else ""


def cost_table(collected: Collected) -> list[list[str]]:
    """What a cell of each method costs, the mean over its finished cells and the largest memory."""
    header = ["method", "parameters", "training images", "cells", "training s", "whole cell s"]
    rows = [[*header, "peak memory MiB"]]
    for method, parameters in zip(collected.methods, parameters_row(collected)[1:], strict=True):
        ids = {
            cell
            for outcome in collected.outcomes
            if outcome.entry.method == method
            for candidate in outcome.entry.candidates
            for cell in candidate.cells
        }
        found = [collected.results[cell].found for cell in ids if cell in collected.results]
        memory = [f["peak_memory_mib"] for f in found if f["peak_memory_mib"] is not None]
        seconds = [
            f"{statistics.mean(f[key] for f in found):.1f}" if found else ""
            for key in ("train_seconds", "seconds")
        ]
        rows.append(
            [
                method,
                parameters,
                _range({f["train_images"] for f in found if f.get("train_images") is not None}),
                f"{len(found)} of {len(ids)}",
                *seconds,
                f"{max(memory):,.0f}" if memory else "",
            ]
        )
    return rows


def choice_table(collected: Collected) -> list[list[str]]:
    """Mean validation accuracy of every setting, the chosen one marked; empty without a choice."""
    entries = [o for o in collected.outcomes if len(o.entry.candidates) > 1]
    if not entries:
        return []
    places = list(dict.fromkeys(key for o in entries for key in o.entry.place))
    settings = list(
        dict.fromkeys(tuple(c.setting.items()) for o in entries for c in o.entry.candidates)
    )
    rows = [["method", *places, *(_setting(dict(s)) for s in settings)]]
    for outcome in entries:
        cells = {}
        for candidate, score in zip(outcome.entry.candidates, outcome.scores, strict=True):
            mark = " *" if candidate is outcome.chosen else ""
            text = "?" if score is None else f"{100 * score:.1f}"
            cells[tuple(candidate.setting.items())] = f"{text}{mark}"
        place = [str(outcome.entry.place.get(key, "")) for key in places]
        rows.append([outcome.entry.method, *place, *(cells.get(s, "") for s in settings)])
    return rows


def choice_note(collected: Collected) -> str:
    """How to read the choices, and which learning rates lie at an end of their list."""
    note = "Mean validation accuracy over seeds in percent, * the chosen setting"
    ends: dict[str, None] = {}
    for outcome in collected.outcomes:
        rates = {c.setting["lr"] for c in outcome.entry.candidates if "lr" in c.setting}
        chosen = outcome.chosen
        if len(rates) > 1 and chosen and chosen.setting["lr"] in (min(rates), max(rates)):
            ends[outcome.entry.method] = None
    if not ends:
        return note
    methods = ", ".join(ends)
    return f"{note}; at an end of the learning rates, beyond which others may do better: {methods}"


def _setting(setting: dict[str, float]) -> str:
    return " ".join(f"{key} {value:g}" for key, value in setting.items())


def failure_table(collected: Collected) -> list[list[str]]:
    """Cells that failed or are not finished; empty if there are none."""
    rows = [[cell, message] for cell, message in collected.failures.items()]
    rows += [[cell, "not finished"] for cell in collected.unfinished]
    return [["cell", "what happened"], *rows] if rows else []
