"""The plots of a grid, as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlkr.comparison.plan import Place
from vlkr.comparison.results import GridResults
from vlkr.reporting import figures
from vlkr.reporting.figures import GRAY, Bin, Line

#: a method's values in a place, one per seed.
At = Callable[[str, Place], list[float]]


def plot_over_shots(
    results: GridResults, shots: Sequence[int], panels: Mapping[str, At], path: Path
) -> None:
    """Plots top-1 accuracy over shots: a line per method, a band of one standard deviation.

    Args:
        results: of the grid.
        shots: on the x axis.
        panels: title and what to show there.
        path: of the PNG.
    """
    figure, grid = figures.panels(len(panels), 4.6, 3.8, len(panels))
    for axes, (title, at) in zip(grid, panels.items(), strict=True):
        lines = []
        for method, color in _colors(results).items():
            points = {number: v for number in shots if (v := at(method, {"shots": number}))}
            means = [100 * statistics.mean(v) for v in points.values()]
            deviations = [100 * statistics.stdev(v) if len(v) > 1 else 0 for v in points.values()]
            style = "--" if color == GRAY else "o-"
            lines.append(Line(method, list(points), means, deviations, color, style))
        figures.lines(axes, lines, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(shots), [str(number) for number in shots])
        axes.minorticks_off()
        axes.set_xlabel("shots")
        axes.set_title(title, loc="left", fontsize=10)
        figures.plain(axes, grid=True)
    grid[0].set_ylabel("top-1 accuracy, %")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figures.save_figure(figure, path)


def plot_shift(
    results: GridResults,
    places: Sequence[Place],
    in_distribution: At,
    under_shift: At,
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Plots accuracy under shift over that in-distribution: a point per place, a line per method.

    Args:
        results: of the grid.
        places: in the grid.
        in_distribution: accuracies on the x axis.
        under_shift: accuracies on the y axis.
        labels: of the axes.
        path: of the PNG.
    """
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for method, color in _colors(results).items():
        pairs = [(in_distribution(method, place), under_shift(method, place)) for place in places]
        points = dict.fromkeys(
            (100 * statistics.mean(x), 100 * statistics.mean(y)) for x, y in pairs if x and y
        )
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=color, label=method, markersize=5, linewidth=1)
    axes.axis(axes.axis())  # the diagonal does not widen what is shown
    axes.axline((50, 50), slope=1, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel(f"{labels[0]}, top-1 %")
    axes.set_ylabel(f"{labels[1]}, top-1 %")
    figures.plain(axes, grid=True)
    figure.legend(loc="outside lower center", ncols=4)
    figures.save_figure(figure, path)


def plot_bars(
    results: GridResults, groups: Mapping[str, Callable[[str], list[float]]], path: Path
) -> None:
    """Plots bars of top-1 accuracy, a group per label, a color per method, whiskers over seeds."""
    figure = Figure(figsize=(max(6.0, 1.2 * len(groups) + 2), 4), layout="constrained")
    axes = figure.subplots()
    values = {method: [at(method) for at in groups.values()] for method in results.methods}
    figures.bars(axes, list(groups), values, _colors(results))
    figures.plain(axes, grid=True)
    figure.legend(loc="outside lower center", ncols=5)
    figures.save_figure(figure, path)


def plot_calibration(results: GridResults, place: Place, name: str, path: Path) -> None:
    """Plots a reliability diagram per method with results, on one set, each with its first seed."""
    diagrams = {}
    for method in results.methods:
        runs = results.at(method, place)
        if runs is None:
            continue
        record = runs.results[0].sets[name]
        images, ece = record["images"], 100 * record["metrics"]["ece"]
        title = f"{method} on {name}\n{images} images, ECE {ece:.1f} %"
        diagrams[title] = [
            Bin(b["lower"], b["upper"], b["confidence"], b["accuracy"], b["images"] / images)
            for b in record["reliability"]
        ]
    figures.reliability(path, diagrams)


def _colors(results: GridResults) -> dict[str, Any]:
    """A color per method; gray for zero-shot."""
    gray = [
        method
        for method in results.methods
        if {r.cell.kind for runs in results.of_method(method) for r in runs.results}
        == {"zero-shot"}
    ]
    return figures.method_colors(results.methods, gray)
