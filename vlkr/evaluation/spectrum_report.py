"""Spectra of runs as a person and a program read them: tables, JSON, a heat map and curves."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from vlkr.files import write_json, write_text
from vlkr.reporting.figures import save_figure
from vlkr.reporting.table import Table

MEASURES = {
    "effective_rank": ("effective rank", 1),
    "stable_rank": ("stable rank", 2),
    "nuclear_norm": ("nuclear norm", 3),
    "frobenius_norm": ("Frobenius norm", 3),
    "spectral_norm": ("spectral norm", 3),
    "ratio": ("Frobenius norm / base weight's", 3),
    "overlap": ("overlap with base's leading subspaces", 3),
    "chance_overlap": ("that overlap by chance", 3),
}
NOTE = (
    "overlap: mean squared cosine between the leading singular subspaces of the change and of "
    "the base weight, 16 dimensions or a quarter of the weight's"
)


@dataclass(frozen=True)
class Layer:
    """One adapted weight.

    Attributes:
        name: ``visual...attn.q``.
        tower: ``visual``, ``text``, ``decoder`` or ``model``.
        block: index of the transformer block, if it lies in one.
        projection: ``q``, ``fc1``, ...
        shape: ``(out_features, in_features)``.
        measures: of the change, and of the base weight with ``base_`` before the name.
        sigma: singular values of the change.
        base_sigma: of the base weight.
    """

    name: str
    tower: str
    block: int | None
    projection: str
    shape: tuple[int, int]
    measures: dict[str, float]
    sigma: list[float]
    base_sigma: list[float]

    @property
    def place(self) -> str:
        """Tower and block."""
        return self.tower if self.block is None else f"{self.tower} {self.block}"


@dataclass
class Run:
    """The layers of one run.

    Attributes:
        folder: of the run.
        method: the adapter's name, with options where runs of that adapter differ in them.
        layers: in the model's order.
        shift_loss: top-1 accuracy lost from home to the mean of shifts, if it was measured.
    """

    folder: str
    method: str
    layers: list[Layer]
    shift_loss: float | None = None

    def mean(self, measure: str) -> float:
        """Mean of a measure over layers."""
        return statistics.mean(layer.measures[measure] for layer in self.layers)


@dataclass
class Spectra:
    """The spectra of runs.

    Attributes:
        runs: in the order given.
        correlations: Spearman's, of each measure with the loss under shift.
        output: folder of the report, if it was written.
    """

    runs: list[Run]
    correlations: dict[str, float]
    output: Path | None = None

    @property
    def methods(self) -> list[str]:
        """Names, in the order of the runs."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def layer_means(self, method: str, measure: str) -> dict[str, float]:
        """A measure of each layer, the mean over a method's runs."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            if run.method == method:
                for layer in run.layers:
                    found.setdefault(layer.name, []).append(layer.measures[measure])
        return {name: statistics.mean(values) for name, values in found.items()}

    def comparisons(self) -> list[dict[str, Any]]:
        """For each two methods, in how many common layers the first has the higher rank."""
        found = []
        for a, b in combinations(self.methods, 2):
            first, second = (self.layer_means(m, "effective_rank") for m in (a, b))
            common = [name for name in first if name in second]
            above = sum(first[name] > second[name] for name in common)
            found.append({"methods": [a, b], "layers": len(common), "first_above": above})
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything but the singular values, which ``spectrum.json`` holds too."""
        found = self.full_json()
        for run in found["runs"]:
            for layer in run["layers"]:
                del layer["sigma"], layer["base_sigma"]
        return found

    def full_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "runs": [asdict(run) for run in self.runs],
            "effective_rank_by_layer": self.comparisons(),
            "spearman_with_shift_loss": self.correlations,
        }

    def method_rows(self) -> list[list[str]]:
        """The table of measures: means over layers and runs, a column a method."""
        groups = {
            method: [layer for run in self.runs if run.method == method for layer in run.layers]
            for method in self.methods
        }
        runs = [str(sum(run.method == method for run in self.runs)) for method in groups]
        counts = [str(len({layer.name for layer in layers})) for layers in groups.values()]
        rows = [
            ["mean over layers", *groups, "base weights"],
            ["runs", *runs, ""],
            ["layers", *counts, ""],
        ]
        for measure, (title, digits) in MEASURES.items():
            cells = [_mean(layers, measure, digits) for layers in groups.values()]
            rows.append([title, *cells, _mean(groups[self.methods[0]], f"base_{measure}", digits)])
        return rows

    def place_rows(self) -> list[list[str]]:
        """The table of places: effective rank by tower and projection, a column a method."""
        rows = [["effective rank", *self.methods]]
        layers = {layer.name: layer for run in self.runs for layer in run.layers}
        means = {method: self.layer_means(method, "effective_rank") for method in self.methods}
        for kind in ("tower", "projection", "place"):
            for value in dict.fromkeys(getattr(layer, kind) for layer in layers.values()):
                names = [n for n, layer in layers.items() if getattr(layer, kind) == value]
                cells = []
                for method in self.methods:
                    found = [means[method][n] for n in names if n in means[method]]
                    cells.append(f"{statistics.mean(found):.1f}" if found else "")
                rows.append([value, *cells])
        return rows

    def sentences(self) -> list[str]:
        """Comparisons and correlations in words."""
        found = [
            f"{c['methods'][0]} has a higher effective rank than {c['methods'][1]} in "
            f"{c['first_above']} of {c['layers']} layers."
            for c in self.comparisons()
        ]
        if self.correlations:
            losses = sum(run.shift_loss is not None for run in self.runs)
            text = ", ".join(f"{name} {value:+.2f}" for name, value in self.correlations.items())
            found.append(f"Spearman correlation with the loss under shift, {losses} runs: {text}.")
        return found

    def show(self, console: Console) -> None:
        """Prints the tables and the comparisons."""
        console.print(Table.of("Spectra of the changes", self.method_rows(), NOTE).rich())
        console.print(Table.of("By place", self.place_rows()).rich())
        for sentence in self.sentences():
            console.print(sentence, highlight=False, markup=False)
        if self.output is not None:
            console.print(f"Report and pictures: {self.output}", highlight=False, markup=False)


def _mean(layers: list[Layer], measure: str, digits: int) -> str:
    """Empty for a measure that there is not."""
    values = [layer.measures[measure] for layer in layers if measure in layer.measures]
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def write_report(result: Spectra, output: Path) -> None:
    """Writes tables, JSON and pictures into a folder."""
    write_json(output / "spectrum.json", result.full_json())
    sentences = "\n".join(f"- {sentence}" for sentence in result.sentences())
    methods, places = (Table.of("", rows) for rows in (result.method_rows(), result.place_rows()))
    text = (
        f"# Spectra of adapted layers\n\n{methods.markdown()}\n{NOTE}.\n\n"
        f"{places.markdown()}\n{sentences}\n"
    )
    write_text(output / "report.md", text)
    plot_heatmap(result, output / "heatmap.png")
    plot_curves(result, output / "curves.png")


def plot_heatmap(result: Spectra, path: Path) -> None:
    """Effective rank of the change, a panel a method, a row a block, a column a projection."""
    layers = {layer.name: layer for run in result.runs for layer in run.layers}
    places = list(dict.fromkeys(layer.place for layer in layers.values()))
    projections = list(dict.fromkeys(layer.projection for layer in layers.values()))
    grids = {}
    for method in result.methods:
        grids[method] = np.full((len(places), len(projections)), np.nan)
        for name, value in result.layer_means(method, "effective_rank").items():
            layer = layers[name]
            row, column = places.index(layer.place), projections.index(layer.projection)
            grids[method][row, column] = value
    highest = max(np.nanmax(grid) for grid in grids.values())
    size = (1.2 + 3.6 * len(grids), 1.2 + 0.32 * len(places))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False)
    for i, (axes, (method, grid)) in enumerate(zip(panels[0], grids.items(), strict=True)):
        image = axes.imshow(grid, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if value < 0.6 * highest else "black"
                axes.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=7
                )
        axes.set_title(method, loc="left", fontsize=10)
        axes.set_xticks(range(len(projections)), projections, fontsize=8)
        axes.set_yticks(range(len(places)), places if i == 0 else [""] * len(places), fontsize=8)
    figure.colorbar(image, ax=panels, label="effective rank of the change", shrink=0.8)
    save_figure(figure, path)


def plot_curves(result: Spectra, path: Path) -> None:
    """Singular values relative to the largest, a panel a projection, a line a method."""
    layers = [layer for run in result.runs for layer in run.layers]
    projections = list(dict.fromkeys(layer.projection for layer in layers))
    columns = min(3, len(projections))
    lines = -(-len(projections) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(projections) :]:
        axes.set_visible(False)
    for axes, projection in zip(grid.flat, projections, strict=False):
        base = [layer.base_sigma for layer in layers if layer.projection == projection]
        axes.plot(*_mean_curve(base), color="black", linewidth=2, label="base weight")
        for i, method in enumerate(result.methods):
            curves = [
                layer.sigma
                for run in result.runs
                if run.method == method
                for layer in run.layers
                if layer.projection == projection
            ]
            if curves:
                color = matplotlib.colormaps["tab10"](i % 10)
                axes.plot(*_mean_curve(curves), color=color, linewidth=1.5, label=method)
        axes.set_title(projection, loc="left", fontsize=10)
        axes.set_xlabel("index / count", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("singular value / largest", fontsize=8)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save_figure(figure, path)


def _mean_curve(spectra: list[list[float]]) -> tuple[Any, Any]:
    """Spectra of any lengths, relative to their largest values, on one axis from 0 to 1."""
    x = np.linspace(0, 1, 101)
    curves = [
        np.interp(x, np.linspace(0, 1, len(sigma)), np.array(sigma) / (sigma[0] or 1))
        for sigma in spectra
    ]
    return x, np.mean(curves, axis=0)
