"""Figures as PNG, each written in one step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlkr.files import atomic_file

BLUE, ORANGE, GRAY = "#1b6ca8", "#e08a1e", "#9a9a9a"
_MAX_PANELS = 24  # diagrams per figure; hundreds would take minutes and fit no screen


@dataclass(frozen=True)
class Line:
    """Points of one label: ``x``, the mean ``y`` and an optional deviation for a band."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    deviation: Sequence[float] | None = None
    color: Any = None
    style: str = "-"


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram: its edges, mean confidence, accuracy, and share of images."""

    lower: float
    upper: float
    confidence: float
    accuracy: float
    share: float


def method_colors(methods: Sequence[str], gray: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a color per method; those in ``gray`` are gray."""
    palette = matplotlib.colormaps["tab10"]
    return {m: GRAY if m in gray else palette(i % 10) for i, m in enumerate(methods)}


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG in one step."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def plain(axes: Axes, *, grid: bool = False) -> None:
    """Removes the upper and right frame, and optionally draws a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.set_axisbelow(True)


def panels(
    count: int, width: float, height: float, columns: int, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """Makes a figure with ``count`` visible axes in rows of at most ``columns``.

    Args:
        count: number of axes.
        width: of one axes, in inches.
        height: of one axes, in inches.
        columns: most axes per row.
        **kwargs: passed to ``Figure.subplots``, such as ``sharey``.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def lines(axes: Axes, shown: Sequence[Line], **plot: Any) -> None:
    """Draws lines, with a band of one deviation where there is one."""
    for line in shown:
        axes.plot(line.x, line.y, line.style, color=line.color, label=line.label, **plot)
        if line.deviation is not None:
            low = [y - d for y, d in zip(line.y, line.deviation, strict=True)]
            high = [y + d for y, d in zip(line.y, line.deviation, strict=True)]
            axes.fill_between(line.x, low, high, color=line.color, alpha=0.15, linewidth=0)


def bars(
    axes: Axes,
    groups: Sequence[str],
    values: Mapping[str, Sequence[Sequence[float]]],
    colors: Mapping[str, Any],
) -> None:
    """Draws grouped bars of means in percent, with whiskers of one standard deviation.

    Args:
        axes: to draw on.
        groups: labels on the x axis.
        values: by method, for each group its values in [0, 1]; an empty one draws no bar.
        colors: by method.
    """
    width = 0.84 / len(values)
    for i, (method, by_group) in enumerate(values.items()):
        offset = (i - (len(values) - 1) / 2) * width
        known = [(j, v) for j, v in enumerate(by_group) if v]
        deviations = [100 * statistics.stdev(v) if len(v) > 1 else math.nan for _, v in known]
        axes.bar(
            [j + offset for j, _ in known],
            [100 * statistics.mean(v) for _, v in known],
            width,
            yerr=deviations,
            error_kw={"linewidth": 0.8},
            capsize=2,
            color=colors[method],
            label=method,
        )
    rotation = 20 if len(groups) > 4 else 0
    axes.set_xticks(range(len(groups)), list(groups), rotation=rotation, fontsize=8)
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_ylim(0, 100)


def reliability(path: Path, diagrams: Mapping[str, Sequence[Bin]]) -> None:
    """Draws accuracy over confidence, and the share of images in each bin, one panel per title.

    Of more than 24 diagrams the first 24 are shown, and the figure says so.
    """
    shown = list(diagrams.items())[:_MAX_PANELS]
    figure, grid = panels(len(shown), 3.05, 3.05, 4, sharex=True, sharey=True)
    for axes, (title, bins) in zip(grid, shown, strict=True):
        left, width = [b.lower for b in bins], [b.upper - b.lower for b in bins]
        accuracy = [b.accuracy for b in bins]
        axes.bar(left, [b.share for b in bins], width, align="edge", color=GRAY, alpha=0.35)
        axes.bar(left, accuracy, width, align="edge", facecolor="none", edgecolor=BLUE)
        axes.plot([b.confidence for b in bins], accuracy, "o", color=BLUE, markersize=3)
        axes.plot([0, 1], [0, 1], ":", color="black", linewidth=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_title(title, loc="left", fontsize=9)
        plain(axes)
    if len(shown) < len(diagrams):
        figure.suptitle(f"the first {len(shown)} of {len(diagrams)}", fontsize=10)
    figure.supxlabel("confidence (gray: share of the images)", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    save_figure(figure, path)


def heatmap(
    path: Path, grids: Mapping[str, Any], rows: Sequence[str], columns: Sequence[str], label: str
) -> None:
    """Draws matrices of values side by side on one color scale, each value written in its cell.

    Args:
        path: of the PNG.
        grids: arrays ``(len(rows), len(columns))`` by title; NaN stays empty.
        rows: labels.
        columns: labels.
        label: of the color bar.
    """
    import numpy as np

    highest = max(np.nanmax(grid) for grid in grids.values())
    size = (1.2 + 3.6 * len(grids), 1.2 + 0.32 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes_row = figure.subplots(1, len(grids), squeeze=False)[0]
    for i, (axes, (title, grid)) in enumerate(zip(axes_row, grids.items(), strict=True)):
        image = axes.imshow(grid, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if value < 0.6 * highest else "black"
                style = {"ha": "center", "va": "center", "fontsize": 7, "color": color}
                axes.text(column, row, f"{value:.0f}", **style)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_yticks(range(len(rows)), rows if i == 0 else [""] * len(rows), fontsize=8)
    figure.colorbar(image, ax=axes_row, label=label, shrink=0.8)
    save_figure(figure, path)
