"""The benchmark's results: a table, JSON and two pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console

from vlkr.files import write_json, write_text
from vlkr.reporting.figures import save_figure
from vlkr.reporting.table import Table

COLUMNS = {
    "sigma_difference": ("|Δσ|", 2),
    "frobenius": ("Frobenius", 1),
    "relative_frobenius": ("relative", 4),
    "spectral_error": ("spectral", 3),
    "subspace_error": ("subspace", 3),
    "effective_rank": ("eff. rank", 1),
    "stable_rank": ("stable rank", 1),
    "nuclear_norm": ("nuclear", 0),
}
OVERVIEW = {
    "relative_frobenius": ("Relative Frobenius error, trained", 3),
    "frobenius": ("Frobenius error, trained", 0),
    "optimum": ("Relative Frobenius error of the optimum in closed form", 3),
    "sigma_difference": ("Mean difference of sorted singular values (blind to vectors)", 2),
    "effective_rank": ("Effective rank", 0),
}
NOTE = (
    "|Δσ| is the mean difference of sorted singular values, blind to their vectors; relative, "
    "optimum and spectral are norms of the difference over the target's; subspace is 1 less the "
    "mean squared cosine of the leading 16 dimensions; the optimum is the closed form"
)


@dataclass(frozen=True)
class Row:
    """One method on one target.

    Attributes:
        target: name.
        method: name.
        parameters: trained ones.
        options: of the adapter.
        trained: measures of the trained approximation, one a seed.
        optima: relative Frobenius errors of the closed form, one a seed, if there is one.
        spectrum: singular values of the first seed's trained approximation.
    """

    target: str
    method: str
    parameters: int
    options: dict[str, Any]
    trained: list[dict[str, float]]
    optima: list[float]
    spectrum: list[float] | None = None

    def values(self, measure: str) -> list[float]:
        """A measure of the trained approximation, one a seed."""
        return [m[measure] for m in self.trained]

    def mean(self, measure: str) -> float:
        """Its mean over seeds."""
        return statistics.mean(self.values(measure))

    def to_json(self, budget: int) -> dict[str, Any]:
        """Everything but the spectrum, with means and deviations over seeds."""
        found = asdict(self)
        del found["spectrum"]
        return {
            **found,
            "budget_ratio": round(self.parameters / budget, 4),
            "mean": {m: self.mean(m) for m in COLUMNS} if self.trained else {},
            "deviation": {
                m: statistics.stdev(self.values(m)) for m in COLUMNS if len(self.trained) > 1
            },
        }


def joined(parts: Iterable[Row]) -> list[Row]:
    """Rows of all seeds, from rows of some seeds each, in their order."""
    rows: dict[tuple[str, str], Row] = {}
    for part in parts:
        row = rows.setdefault((part.target, part.method), part)
        if row is not part:
            row.trained.extend(part.trained)
            row.optima.extend(part.optima)
    return list(rows.values())


@dataclass
class Approximation:
    """What the benchmark found.

    Attributes:
        targets: measures of the targets, one a seed.
        spectra: singular values of the first seed's targets.
        rows: a method on a target each.
        context: what the numbers depend on.
        output: folder of the report, if it was written.
    """

    targets: dict[str, list[dict[str, float]]]
    spectra: dict[str, list[float]]
    rows: list[Row]
    context: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None

    def row(self, target: str, method: str) -> Row:
        """The row of a method on a target."""
        return next(r for r in self.rows if (r.target, r.method) == (target, method))

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        budgets = self.context["budgets"]
        return {
            **self.context,
            "targets": self.targets,
            "rows": [row.to_json(budgets[row.target]) for row in self.rows],
        }

    def cells(self) -> list[list[str]]:
        """The table: a section a target, its own measures first."""
        shown = COLUMNS if any(row.trained for row in self.rows) else {}
        table = [["target", "method", "parameters", "optimum", *(n for n, _ in shown.values())]]
        for target, measures in self.targets.items():
            own = [
                spread([m[name] for m in measures], digits) if name in measures[0] else ""
                for name, (_, digits) in shown.items()
            ]
            table.append([target, "(the target)", "", "", *own])
            for row in self.rows:
                if row.target == target:
                    values = [spread(row.values(n), digits) for n, (_, digits) in shown.items()]
                    optimum = spread(row.optima, 4) if row.optima else ""
                    table.append(["", row.method, f"{row.parameters:,}", optimum, *values])
        return table

    def caption(self) -> str:
        """The context in one line."""
        context = {k: v for k, v in self.context.items() if v is not None and k != "budgets"}
        context["budget"] = _numbers(self.context["budgets"].values())
        found: dict[str, list[int]] = {}
        for row in self.rows:
            found.setdefault(row.method, []).append(row.parameters)
        sizes = ", ".join(f"{method} {_numbers(sizes)}" for method, sizes in found.items())
        return ", ".join(f"{k} {v}" for k, v in context.items()) + f"; parameters: {sizes}"

    def overview(self, measure: str, digits: int) -> list[list[str]]:
        """One measure's means: a row a method, a column a target. ``optimum`` is a measure too."""
        rows = [["method", *map(_short, self.targets)]]
        if measure == "effective_rank":
            own = (statistics.mean(m[measure] for m in ms) for ms in self.targets.values())
            rows.append(["(the target)", *(f"{value:.{digits}f}" for value in own)])
        for method in dict.fromkeys(row.method for row in self.rows):
            found = [self.row(target, method) for target in self.targets]
            values = [r.optima if measure == "optimum" else r.values(measure) for r in found]
            if any(values):
                means = (f"{statistics.mean(v):.{digits}f}" if v else "" for v in values)
                rows.append([method, *means])
        return rows

    def show(self, console: Console) -> None:
        """Prints the main measures and what their numbers depend on."""
        authors = self.context["protocol"] == "authors"
        skipped = "relative_frobenius" if authors else "frobenius"
        for measure, (title, digits) in OVERVIEW.items():
            if measure == skipped:
                continue
            rows = self.overview(measure, digits)
            if any(cell for row in rows[1:] for cell in row[1:]):
                console.print(Table.of(title, rows).rich())
        console.print(self.caption(), style="dim", highlight=False, markup=False)
        if self.output is not None:
            console.print(f"Report and pictures: {self.output}", highlight=False, markup=False)


def _numbers(values: Iterable[int]) -> str:
    return " ".join(f"{value:,}" for value in dict.fromkeys(values))


def _short(target: str) -> str:
    r"""A target's name in lines, so that a table of six fits into 80 columns.

    >>> _short("high-frequency"), _short("visual.transformer.resblocks.3.attn.in_proj_weight")
    ('high\nfreq', 'visual\n...\nin_proj_weight')
    """
    if target.count(".") > 1:
        return "\n...\n".join(target.split(".")[:: target.count(".")])
    return target.replace("frequency", "freq").replace("-", "\n", 1)


def spread(values: list[float], digits: int) -> str:
    """Mean and, over several values, standard deviation in units of the last digits.

    >>> spread([1.0, 3.0], 2), spread([1.0], 2)
    ('2.00 ± 1.41', '1.00')
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def write_report(result: Approximation, output: Path) -> None:
    """Writes table, JSON and pictures into a folder."""
    write_json(output / "results.json", result.to_json())
    table = Table.of("", result.cells()).markdown()
    text = f"# Approximation of matrices\n\n{table}\n{NOTE}.\n\n{result.caption()}.\n"
    write_text(output / "report.md", text)
    plot_errors(result, output / "errors.png")
    if any(row.spectrum for row in result.rows):
        plot_spectra(result, output / "spectra.png")


def _colors(result: Approximation) -> dict[str, Any]:
    methods = dict.fromkeys(row.method for row in result.rows)
    return {m: matplotlib.colormaps["tab10"](i % 10) for i, m in enumerate(methods)}


def plot_errors(result: Approximation, path: Path) -> None:
    """Relative Frobenius errors: a group a target, a bar a method, a line at its optimum."""
    colors = _colors(result)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(colors)
    for j, target in enumerate(result.targets):
        for i, (method, color) in enumerate(colors.items()):
            row = result.row(target, method)
            x = j + (i - (len(colors) - 1) / 2) * width
            if row.trained:
                axes.bar(x, row.mean("relative_frobenius"), width, color=color)
                if row.optima:
                    best = statistics.mean(row.optima)
                    axes.hlines(best, x - width / 2, x + width / 2, "black", linewidth=1.2)
            elif row.optima:
                axes.bar(x, statistics.mean(row.optima), width, color=color)
    handles: list[Any] = [Rectangle((0, 0), 1, 1, color=c) for c in colors.values()]
    ranks = [statistics.mean(m["effective_rank"] for m in ms) for ms in result.targets.values()]
    axes.set_xticks(
        range(len(ranks)),
        [f"{n}\n(eff. rank {r:.0f})" for n, r in zip(result.targets, ranks, strict=True)],
        fontsize=8,
    )
    axes.set_ylabel("relative Frobenius error")
    trained = any(row.trained for row in result.rows)
    title = "What each method misses; black lines: its optimum"
    axes.set_title(title if trained else "The least that each method can miss", loc="left")
    figure.legend(handles, list(colors), fontsize=8, ncols=8, loc="outside lower center")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def plot_spectra(result: Approximation, path: Path) -> None:
    """Singular values of each target and of the trained approximations, a panel a target."""
    colors = _colors(result)
    columns = min(3, len(result.targets))
    lines = -(-len(result.targets) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(result.targets) :]:
        axes.set_visible(False)
    for axes, (target, sigma) in zip(grid.flat, result.spectra.items(), strict=False):
        axes.plot(sigma, color="black", linewidth=2, label="target")
        for method, color in colors.items():
            spectrum = result.row(target, method).spectrum
            if spectrum is not None:
                axes.plot(spectrum, color=color, linewidth=1, label=method)
        axes.set_title(target, loc="left", fontsize=10)
        axes.set_xlabel("index", fontsize=8)
        axes.set_ylabel("singular value", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save_figure(figure, path)
