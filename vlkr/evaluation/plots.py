"""Figures of evaluations, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlkr.files import atomic_file

if TYPE_CHECKING:
    from vlkr.evaluation.interpolation import Interpolation
    from vlkr.evaluation.report import DatasetResult

_PANELS = 24
"""Diagrams in a picture; of hundreds it would take minutes, and a screen shows no more."""
_BLUE, _ORANGE, _GRAY = "#1b6ca8", "#e08a1e", "#9a9a9a"


def plot_reliability(results: Sequence[DatasetResult], path: Path) -> None:
    """A reliability diagram a dataset: accuracy over confidence, and where the images lie.

    Of more than 24 datasets the first 24 are shown, and said to be.
    """
    shown = results[:_PANELS]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.9 * rows + 0.5), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, result in zip(grid, shown, strict=False):
        _reliability_axes(axes, result)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    if len(shown) < len(results):
        figure.suptitle(f"the first {len(shown)} of {len(results)}", fontsize=10)
    figure.supxlabel("confidence (grey: share of the images)", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    save_figure(figure, path)


def _reliability_axes(axes: Axes, result: DatasetResult) -> None:
    bins = result.reliability
    left = [part.lower for part in bins]
    width = [part.upper - part.lower for part in bins]
    shares = [part.images / result.images for part in bins]
    axes.bar(left, shares, width, align="edge", color=_GRAY, alpha=0.35)
    axes.bar(
        left,
        [part.accuracy for part in bins],
        width,
        align="edge",
        facecolor="none",
        edgecolor=_BLUE,
    )
    axes.plot(
        [part.confidence for part in bins],
        [part.accuracy for part in bins],
        "o",
        color=_BLUE,
        markersize=3,
    )
    axes.plot([0, 1], [0, 1], ":", color="black", linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_title(
        f"{result.dataset}\n{result.images} images, ECE {100 * result.metrics['ece']:.1f} %",
        loc="left",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)


def plot_interpolation(result: Interpolation, path: Path) -> None:
    """Accuracy under shift over accuracy at home, a point an alpha: the mean and each shift."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.subplots()
    evaluations = [point.evaluation for point in result.points]
    home = [100 * e.home.metrics["acc1"] for e in evaluations]
    shifts = evaluations[0].shifts
    for i, shift in enumerate(shifts):
        values = [100 * e.shifts[i].metrics["acc1"] for e in evaluations]
        axes.plot(home, values, color=_GRAY, linewidth=0.8)
        axes.annotate(shift.dataset, (home[-1], values[-1]), fontsize=7, color=_GRAY)
    means = [100 * e.mean_shift() for e in evaluations]
    name = shifts[0].dataset if len(shifts) == 1 else f"mean of {len(shifts)} shifts"
    axes.plot(home, means, "o-", color=_BLUE, markersize=4, label=name)
    for point, x, y in zip(result.points, home, means, strict=True):
        if point is result.best:
            axes.plot([x], [y], "*", color=_ORANGE, markersize=14, label="best on validation")
        axes.annotate(
            f"{point.alpha:g}", (x, y), (4, 4), textcoords="offset points", fontsize=7, color=_BLUE
        )
    axes.set_xlabel(f"top-1 accuracy on {evaluations[0].home.dataset} (home), %")
    axes.set_ylabel("top-1 accuracy under shift, %")
    axes.set_title("Along the adapter, by alpha", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG in one step."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
