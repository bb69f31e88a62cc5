"""The plots of a grid, as PNG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlkr.comparison.plan import Place
from vlkr.comparison.results import GridResults
from vlkr.reporting.figures import Bin, reliability, save_figure
from vlkr.reporting.table import percent

#: a method's values in a place, one per seed.
At = Callable[[str, Place], list[float]]


def colors(results: GridResults) -> dict[str, Any]:
    """A color per method; gray for zero-shot."""
    palette = matplotlib.colormaps["tab10"]
    by_method: dict[str, Any] = {}
    for method in results.methods:
        kinds = {r.cell.kind for runs in results.of_method(method) for r in runs.results}
        is_zero_shot = kinds == {"zero-shot"}
        by_method[method] = "#9a9a9a" if is_zero_shot else palette(len(by_method) % 10)
    return by_method


def plot_over_shots(
    results: GridResults, shots: Sequence[int], panels: Mapping[str, At], path: Path
) -> None:
    """Top-1 accuracy over shots: a line a method, a band of one standard deviation over seeds.

    Args:
        results: of the grid.
        shots: on the x axis.
        panels: title and what to show there.
        path: of the PNG.
    """
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, at) in zip(grid, panels.items(), strict=True):
        for method, color in colors(results).items():
            points = [(s, v) for s in shots if (v := at(method, {"shots": s}))]
            x = [s for s, _ in points]
            mean = [100 * statistics.mean(v) for _, v in points]
            off = [100 * statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
            style = "--" if color == "#9a9a9a" else "o-"
            axes.plot(x, mean, style, color=color, label=method, markersize=4)
            low, high = ([m + sign * o for m, o in zip(mean, off, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(shots), [str(s) for s in shots])
        axes.minorticks_off()
        axes.set_xlabel("shots")
        axes.set_title(title, loc="left", fontsize=10)
        _plain(axes)
    grid[0].set_ylabel("top-1 accuracy, %")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save_figure(figure, path)


def plot_home_against_shift(
    results: GridResults,
    places: Sequence[Place],
    home: At,
    shift: At,
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Accuracy at home against that under shift: a point a place, a line through a method's."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for method, color in colors(results).items():
        pairs = [(home(method, place), shift(method, place)) for place in places]
        means = [[100 * statistics.mean(v) for v in pair] for pair in pairs if all(pair)]
        points = list(dict.fromkeys(map(tuple, means)))
        if not points:
            continue
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=color, label=method, markersize=5, linewidth=1)
    axes.axis(axes.axis())  # the diagonal does not widen what is shown
    axes.axline((50, 50), slope=1, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel(f"{labels[0]}, top-1 %")
    axes.set_ylabel(f"{labels[1]}, top-1 %")
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=4)
    save_figure(figure, path)


def plot_bars(
    results: GridResults, rows: Mapping[str, Callable[[str], list[float]]], path: Path
) -> None:
    """Bars of top-1 accuracy, a group a row, a colour a method, whiskers over seeds."""
    figure = Figure(figsize=(max(6.0, 1.2 * len(rows) + 2), 4), layout="constrained")
    axes = figure.subplots()
    shown = colors(results)
    width = 0.84 / len(shown)
    for i, (method, color) in enumerate(shown.items()):
        offset = (i - (len(shown) - 1) / 2) * width
        values = [(j, v) for j, at in enumerate(rows.values()) if (v := at(method))]
        axes.bar(
            [j + offset for j, _ in values],
            [100 * statistics.mean(v) for _, v in values],
            width,
            yerr=[100 * statistics.stdev(v) if len(v) > 1 else math.nan for _, v in values],
            error_kw={"linewidth": 0.8},
            capsize=2,
            color=color,
            label=method,
        )
    axes.set_xticks(range(len(rows)), list(rows), rotation=20 if len(rows) > 4 else 0, fontsize=8)
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_ylim(0, 100)
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=5)
    save_figure(figure, path)


def plot_calibration(results: GridResults, place: Place, name: str, path: Path) -> None:
    """A reliability diagram per method with results, on one set, each with its first seed."""
    diagrams: dict[str, list[Bin]] = {}
    for method in results.methods:
        runs = results.at(method, place)
        if runs is not None:
            record = runs.results[0].sets[name]
            number, ece = record["images"], percent(record["metrics"]["ece"])
            diagrams[f"{method} on {name}\n{number} images, ECE {ece} %"] = [
                Bin(b["lower"], b["upper"], b["confidence"], b["accuracy"], b["images"] / number)
                for b in record["reliability"]
            ]
    reliability(path, diagrams)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
