"""The spectra of adapted layers: singular values and ranks of the weight updates of runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlkr.adapters.compose import base_parameter
from vlkr.adapters.inject import injected_adapters
from vlkr.adapters.targets import Target, candidates
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate
from vlkr.files import check_free, write_json, write_text
from vlkr.functional import Decomposition, decompose, spectrum_measures, subspace_overlap
from vlkr.reporting.table import Table
from vlkr.runs import RunFolder, method_labels

#: dimensions of the leading subspaces that are compared, at most a quarter of a weight's.
LEADING = 16
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
_NOTE = (
    "overlap: mean squared cosine between the leading singular subspaces of the change and of "
    "the base weight, 16 dimensions or a quarter of the weight's"
)


@dataclass(frozen=True)
class Layer:
    """One adapted weight.

    Attributes:
        name: ``visual...attn.q``.
        tower: ``visual``, ``text``, ``decoder`` or ``model``.
        block: index of the transformer block, if it is in one.
        projection: ``q``, ``fc1``, ...
        shape: ``(out_features, in_features)``.
        measures: of the weight update, and of the base weight with ``base_`` before the name.
        sigma: singular values of the weight update, in descending order.
        base_sigma: those of the base weight.
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


@torch.no_grad()
def model_spectra(model: nn.Module) -> list[Layer]:
    """Returns the spectra of a model's adapters, in its order."""
    modules = dict(model.named_modules())
    known = {(target.module, target.slot): target for target in candidates(model)}
    layers = []
    for injected in injected_adapters(model):
        if injected.adapter.adapts_bias:
            continue
        module, slot = injected.module, injected.slot
        weight = slot.select(base_parameter(modules[module], slot.parameter))
        # A parameter that no linear layer owns goes by its own name.
        plain = Target(module, slot, injected.name, weight.shape[1], weight.shape[0])
        target = known.get((module, slot), plain)
        delta = injected.scale * injected.adapter.delta(weight)
        measures, sigma, base_sigma = layer_measures(delta.float(), weight.float())
        names = target.path, target.tower or "model", target.block, target.name
        shape, spectra = (weight.shape[0], weight.shape[1]), (sigma.tolist(), base_sigma.tolist())
        layers.append(Layer(*names, shape, measures, *spectra))
    return layers


def layer_measures(delta: Tensor, weight: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """Measures what an update does to a weight.

    ``ratio`` is the update's Frobenius norm over the weight's. ``overlap`` is the mean squared
    cosine between their leading singular subspaces, the mean of left and right, and
    ``chance_overlap`` the mean overlap of random subspaces of that size.

    Args:
        delta: ``(out_features, in_features)``.
        weight: the base weight, of the same shape.

    Returns:
        The measures, and both spectra in descending order.
    """
    leading = max(1, min(LEADING, min(weight.shape) // 4))
    update, base = decompose(delta, leading), decompose(weight, leading)
    measures = {k: float(v) for k, v in spectrum_measures(update.sigma).items()}
    base_measures = {k: float(v) for k, v in spectrum_measures(base.sigma).items()}
    norm = base_measures["frobenius_norm"]
    measures["ratio"] = measures["frobenius_norm"] / norm if norm > 0 else 0.0
    measures["overlap"] = _overlap(update, base)
    measures["chance_overlap"] = statistics.mean(leading / n for n in weight.shape)
    measures |= {f"base_{name}": value for name, value in base_measures.items()}
    return measures, update.sigma, base.sigma


def _overlap(update: Decomposition, base: Decomposition) -> float:
    if update.left.shape[1] == 0 or base.left.shape[1] == 0:
        return 0.0
    sides = (update.left, base.left), (update.right, base.right)
    return statistics.mean(float(subspace_overlap(a, b)) for a, b in sides)


@dataclass
class RunSpectra:
    """The layers of one run.

    Attributes:
        folder: of the run.
        method: the adapter's name, with options where runs of that adapter differ in them.
        layers: in the model's order.
        accuracy_drop: in-distribution top-1 accuracy less the mean under shift, if measured.
    """

    folder: str
    method: str
    layers: list[Layer]
    accuracy_drop: float | None = None

    def mean(self, measure: str) -> float:
        """Returns the mean of a measure over layers."""
        return statistics.mean(layer.measures[measure] for layer in self.layers)


def accuracy_drop(folder: Path, device: str = "auto") -> float | None:
    """Returns a run's top-1 accuracy less its mean under shift; None without shifts."""
    evaluation = evaluate(run=folder, device=device)
    if not evaluation.shifts:
        return None
    return evaluation.in_distribution.metrics["acc1"] - evaluation.mean_shift()


def correlations(runs: Sequence[RunSpectra]) -> dict[str, float]:
    """Returns Spearman's correlation of each measure's mean over layers with the accuracy drop.

    Empty unless three runs have an accuracy drop. Measures that all runs share are left out.
    """
    measured = [(run, run.accuracy_drop) for run in runs if run.accuracy_drop is not None]
    if len(measured) < 3:
        return {}
    drops = [drop for _, drop in measured]
    by_measure = {
        name: spearman([run.mean(name) for run, _ in measured], drops)
        for name in runs[0].layers[0].measures
        if not name.startswith("base_") and name != "chance_overlap"
    }
    return {name: value for name, value in by_measure.items() if value is not None}


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation; None if one side is constant.

    >>> spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
    0.5
    """
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    from scipy.stats import spearmanr  # takes a second to import

    return round(float(spearmanr(a, b).statistic), 12)


@dataclass
class Spectra:
    """The spectra of runs.

    Attributes:
        runs: in the order given.
        correlations: Spearman's, of each measure with the accuracy drop under shift.
        output: folder of the report, if it was written.
    """

    runs: list[RunSpectra]
    correlations: dict[str, float]
    output: Path | None = None
    exit_code = 0

    @property
    def methods(self) -> list[str]:
        """Names, in the order of the runs."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def layers(self, method: str | None = None) -> list[Layer]:
        """Returns the layers of all runs, or of a method's."""
        return [x for run in self.runs if method in (None, run.method) for x in run.layers]

    def layer_means(self, method: str, measure: str) -> dict[str, float]:
        """Returns a measure of each layer by name, the mean over a method's runs."""
        by_name: dict[str, list[float]] = {}
        for layer in self.layers(method):
            by_name.setdefault(layer.name, []).append(layer.measures[measure])
        return {name: statistics.mean(values) for name, values in by_name.items()}

    def comparisons(self) -> list[dict[str, Any]]:
        """Returns per pair of methods in how many common layers the first has the higher rank."""
        ranks = {method: self.layer_means(method, "effective_rank") for method in self.methods}
        rows = []
        for first, second in combinations(self.methods, 2):
            common = [name for name in ranks[first] if name in ranks[second]]
            above = sum(ranks[first][name] > ranks[second][name] for name in common)
            rows.append({"methods": [first, second], "layers": len(common), "first_above": above})
        return rows

    def to_json(self, *, sigma: bool = False) -> dict[str, Any]:
        """Returns everything, the singular values only if asked for."""
        runs = [asdict(run) for run in self.runs]
        for run in runs:
            run["shift_loss"] = run.pop("accuracy_drop")
            if not sigma:
                for layer in run["layers"]:
                    del layer["sigma"], layer["base_sigma"]
        return {
            "runs": runs,
            "effective_rank_by_layer": self.comparisons(),
            "spearman_with_shift_loss": self.correlations,
        }

    def measure_table(self, title: str = "Spectra of the changes", *, brief: bool = True) -> Table:
        """Returns the measures' means over layers and runs, a column per method."""
        groups = {method: self.layers(method) for method in self.methods}
        runs = [str(sum(run.method == method for run in self.runs)) for method in groups]
        counts = [str(len({layer.name for layer in layers})) for layers in groups.values()]
        rows = [
            ["mean over layers", *groups, "base weights"],
            ["runs", *runs, ""],
            ["layers", *counts, ""],
        ]
        base = groups[self.methods[0]]
        for measure, (label, digits) in MEASURES.items():
            cells = [_mean(layers, measure, digits) for layers in groups.values()]
            rows.append([label, *cells, _mean(base, f"base_{measure}", digits)])
        return Table.of(title, rows, _NOTE, brief=brief)

    def place_table(self) -> Table:
        """Returns the effective rank by tower, projection and block, a column per method."""
        rows = [["effective rank", *self.methods]]
        layers = {layer.name: layer for layer in self.layers()}
        means = {method: self.layer_means(method, "effective_rank") for method in self.methods}
        for kind in ("tower", "projection", "place"):
            for value in dict.fromkeys(getattr(layer, kind) for layer in layers.values()):
                names = [n for n, layer in layers.items() if getattr(layer, kind) == value]
                cells = []
                for method in self.methods:
                    ranks = [means[method][n] for n in names if n in means[method]]
                    cells.append(f"{statistics.mean(ranks):.1f}" if ranks else "")
                rows.append([value, *cells])
        return Table.of("By place", rows)

    def tables(self) -> list[Table]:
        """Returns the table of measures and the one of places."""
        return [self.measure_table(), self.place_table()]

    def sentences(self) -> list[str]:
        """Returns comparisons and correlations in words."""
        text = "{} has a higher effective rank than {} in {first_above} of {layers} layers."
        sentences = [text.format(*c["methods"], **c) for c in self.comparisons()]
        if self.correlations:
            runs = sum(run.accuracy_drop is not None for run in self.runs)
            text = ", ".join(f"{name} {value:+.2f}" for name, value in self.correlations.items())
            start = f"Spearman correlation with the accuracy drop under shift, {runs} runs"
            sentences.append(f"{start}: {text}.")
        return sentences

    def lines(self) -> list[str]:
        """Returns the sentences, and where the report is."""
        report = [] if self.output is None else [f"Report and pictures: {self.output}"]
        return [*self.sentences(), *report]

    def write(self, output: Path) -> None:
        """Writes ``spectrum.json``, ``report.md`` and the figures into a folder."""
        write_json(output / "spectrum.json", self.to_json(sigma=True))
        measures, places = self.tables()
        sentences = "\n".join(f"- {sentence}" for sentence in self.sentences())
        text = f"# Spectra of adapted layers\n\n{measures.markdown()}\n{measures.note}.\n\n"
        write_text(output / "report.md", f"{text}{places.markdown()}\n{sentences}\n")
        self._plot_heatmap(output / "heatmap.png")
        self.plot_curves(output / "curves.png")

    def _plot_heatmap(self, path: Path) -> None:
        """Draws effective ranks: a panel per method, a row per block, a column per projection."""
        import numpy as np

        from vlkr.reporting.figures import heatmap

        layers = {layer.name: layer for layer in self.layers()}
        places = list(dict.fromkeys(layer.place for layer in layers.values()))
        projections = list(dict.fromkeys(layer.projection for layer in layers.values()))
        grids = {}
        for method in self.methods:
            grids[method] = np.full((len(places), len(projections)), np.nan)
            for name, value in self.layer_means(method, "effective_rank").items():
                row, column = layers[name].place, layers[name].projection
                grids[method][places.index(row), projections.index(column)] = value
        heatmap(path, grids, places, projections, "effective rank of the change")

    def plot_curves(self, path: Path) -> None:
        """Draws singular values over the largest: a panel per projection, a line per method."""
        from vlkr.reporting.figures import Line, lines, method_colors, panels, plain, save_figure

        projections = list(dict.fromkeys(layer.projection for layer in self.layers()))
        colors = method_colors(self.methods)
        figure, grid = panels(len(projections), 3.4, 2.5, 3, sharey=True)
        for i, (axes, projection) in enumerate(zip(grid, projections, strict=True)):
            base = [x.base_sigma for x in self.layers() if x.projection == projection]
            lines(axes, [Line("base weight", *_mean_curve(base), color="black")], linewidth=2)
            for method in self.methods:
                sigma = [x.sigma for x in self.layers(method) if x.projection == projection]
                if sigma:
                    line = Line(method, *_mean_curve(sigma), color=colors[method])
                    lines(axes, [line], linewidth=1.5)
            axes.set_title(projection, loc="left", fontsize=10)
            axes.set_xlabel("index / count", fontsize=8)
            if i % 3 == 0:
                axes.set_ylabel("singular value / largest", fontsize=8)
            plain(axes)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        save_figure(figure, path)


def _mean(layers: list[Layer], measure: str, digits: int) -> str:
    """Formats a mean over layers; empty for a measure that they lack."""
    values = [layer.measures[measure] for layer in layers if measure in layer.measures]
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def _mean_curve(spectra: list[list[float]]) -> tuple[Any, Any]:
    """Averages spectra of any lengths, relative to their largest values, on an axis in [0, 1]."""
    import numpy as np

    x = np.linspace(0, 1, 101)
    curves = [
        np.interp(x, np.linspace(0, 1, len(sigma)), np.array(sigma) / (sigma[0] or 1))
        for sigma in spectra
    ]
    return x, np.mean(curves, axis=0)


def spectrum(
    run: list[Path],
    include_shifts: bool = True,
    device: str = "auto",
    output: Path | None = None,
    force: bool = False,
) -> Spectra:
    """Shows singular values, ranks and norms of the weight updates of runs, side by side.

    Args:
        run: folders written by ``vlkr adapt``.
        include_shifts: for three runs or more, also correlate the spectra with the accuracy drop.
        device: where to evaluate.
        output: folder for ``spectrum.json``, ``report.md``, ``heatmap.png`` and ``curves.png``.
        force: allow a non-empty output folder.

    Raises:
        VlkrError: if a folder is not a finished run, or has no updated weight.
    """
    if not run:
        raise VlkrError("no run is given, expected --run DIR ...")
    if output is not None:
        check_free(output, force=force)
    folders = [RunFolder.open(path) for path in run]
    labels = method_labels(folders)
    runs = []
    for path, folder in zip(run, folders, strict=True):
        runs.append(RunSpectra(str(path), labels[path], model_spectra(folder.load_model().model)))
        if not runs[-1].layers:
            method = runs[-1].method
            raise VlkrError(f"{path} changed no weight: {method!r} adapts something else")
    if include_shifts and len(runs) > 2:
        for path, spectra in zip(run, runs, strict=True):
            spectra.accuracy_drop = accuracy_drop(path, device)
    result = Spectra(runs, correlations(runs), output)
    if output is not None:
        result.write(output)
    return result
