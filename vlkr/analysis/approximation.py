"""The result of the matrix benchmark: tables, JSON and two figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlkr.files import write_json, write_text
from vlkr.reporting.table import Table, mean_std

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
_TITLE = "Approximation of matrices"
_NOTE = (
    "|Δσ| is the mean difference of sorted singular values, blind to their vectors; relative, "
    "optimum and spectral are norms of the difference over the target's; subspace is 1 less the "
    "mean squared cosine of the leading 16 dimensions; the optimum is the closed form"
)


@dataclass(frozen=True)
class Row:
    """One method on one target.

    Attributes:
        target: its name.
        method: its name.
        parameters: number of trained ones.
        options: of the adapter.
        trained: measures of the trained approximation, per seed.
        optima: relative Frobenius errors of the closed form, per seed, if there is one.
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
        """Returns a measure per seed; ``optimum`` is one."""
        return self.optima if measure == "optimum" else [m[measure] for m in self.trained]

    def to_json(self, budget: int) -> dict[str, Any]:
        """Returns everything but the spectrum, with means and deviations over seeds."""
        fields = asdict(self)
        del fields["spectrum"]
        by_measure = {m: self.values(m) for m in COLUMNS}
        return {
            **fields,
            "budget_ratio": round(self.parameters / budget, 4),
            "mean": {m: statistics.mean(v) for m, v in by_measure.items() if v},
            "deviation": {m: statistics.stdev(v) for m, v in by_measure.items() if len(v) > 1},
        }


@dataclass
class Approximation:
    """The benchmark's result.

    Attributes:
        targets: measures of the targets, per seed.
        spectra: singular values of the first seed's targets.
        rows: one per target and method.
        context: what the numbers depend on.
        output: folder of the report, if it was written.
    """

    targets: dict[str, list[dict[str, float]]]
    spectra: dict[str, list[float]]
    rows: list[Row]
    context: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    exit_code = 0

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def row(self, target: str, method: str) -> Row:
        """Returns the row of a method on a target."""
        return next(r for r in self.rows if (r.target, r.method) == (target, method))

    def to_json(self) -> dict[str, Any]:
        """Returns everything, for a program."""
        budgets = self.context["budgets"]
        return {
            **self.context,
            "targets": self.targets,
            "rows": [row.to_json(budgets[row.target]) for row in self.rows],
        }

    def tables(self) -> list[Table]:
        """Returns a table per main measure, and the report's, which holds all of them."""
        authors = self.context["protocol"] == "authors"
        skipped = "relative_frobenius" if authors else "frobenius"
        overviews = [self._overview(m, *style) for m, style in OVERVIEW.items() if m != skipped]
        shown = [t for t in overviews if any(cell for row in t.rows for cell in row[1:])]
        return [*shown, self._full_table()]

    def _overview(self, measure: str, title: str, digits: int) -> Table:
        """One measure's means over seeds: a row per method, a column per target."""
        rows = [["method", *map(_short, self.targets)]]
        if measure == "effective_rank":
            own = (statistics.mean(m[measure] for m in ms) for ms in self.targets.values())
            rows.append(["(the target)", *(f"{value:.{digits}f}" for value in own)])
        for method in self.methods:
            by_target = [self.row(target, method).values(measure) for target in self.targets]
            if any(by_target):
                means = (f"{statistics.mean(v):.{digits}f}" if v else "" for v in by_target)
                rows.append([method, *means])
        return Table.of(title, rows)

    def _full_table(self) -> Table:
        """All measures: a section per target, its own measures first."""
        shown = COLUMNS if any(row.trained for row in self.rows) else {}
        rows = [["target", "method", "parameters", "optimum", *(n for n, _ in shown.values())]]
        for target, measures in self.targets.items():
            own = [
                mean_std([m[name] for m in measures if name in m], 1, digits)
                for name, (_, digits) in shown.items()
            ]
            rows.append([target, "(the target)", "", "", *own])
            for row in (r for r in self.rows if r.target == target):
                cells = [mean_std(row.values(n), 1, digits) for n, (_, digits) in shown.items()]
                first = ["", row.method, f"{row.parameters:,}", mean_std(row.optima, 1, 4)]
                rows.append([*first, *cells])
        return Table.of(_TITLE, rows, _NOTE, brief=False)

    def caption(self) -> str:
        """Returns the context in one line."""
        context = {k: v for k, v in self.context.items() if v is not None and k != "budgets"}
        context["budget"] = _numbers(self.context["budgets"].values())
        sizes = (
            f"{method} {_numbers(r.parameters for r in self.rows if r.method == method)}"
            for method in self.methods
        )
        parts = (f"{key} {value}" for key, value in context.items())
        return f"{', '.join(parts)}; parameters: {', '.join(sizes)}"

    def lines(self) -> list[str]:
        """Returns the caption, and where the report is."""
        report = [] if self.output is None else [f"Report and pictures: {self.output}"]
        return [self.caption(), *report]

    def write(self, output: Path) -> None:
        """Writes ``results.json``, ``report.md`` and the figures into a folder."""
        write_json(output / "results.json", self.to_json())
        table = self._full_table()
        text = f"# {_TITLE}\n\n{table.markdown()}\n{table.note}.\n\n{self.caption()}.\n"
        write_text(output / "report.md", text)
        self._plot_errors(output / "errors.png")
        if any(row.spectrum for row in self.rows):
            self._plot_spectra(output / "spectra.png")

    def _plot_errors(self, path: Path) -> None:
        """Draws relative errors: a group per target, a bar per method, a line at its optimum."""
        from matplotlib.patches import Rectangle

        from vlkr.reporting.figures import method_colors, panels, plain, save_figure

        colors = method_colors(self.methods)
        figure, (axes,) = panels(1, 10, 4, 1)
        width = 0.85 / len(colors)
        for row in self.rows:
            offset = (self.methods.index(row.method) - (len(colors) - 1) / 2) * width
            x = list(self.targets).index(row.target) + offset
            trained, best = row.values("relative_frobenius"), row.optima
            if trained or best:
                axes.bar(x, statistics.mean(trained or best), width, color=colors[row.method])
            if trained and best:
                span = x - width / 2, x + width / 2
                axes.hlines(statistics.mean(best), *span, "black", linewidth=1.2)
        ranks = [statistics.mean(m["effective_rank"] for m in ms) for ms in self.targets.values()]
        labels = [f"{n}\n(eff. rank {r:.0f})" for n, r in zip(self.targets, ranks, strict=True)]
        axes.set_xticks(range(len(ranks)), labels, fontsize=8)
        axes.set_ylabel("relative Frobenius error")
        title = "Error of each method; black lines: its optimum"
        if not any(row.trained for row in self.rows):
            title = "The least error of each method"
        axes.set_title(title, loc="left")
        handles = [Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
        figure.legend(handles, list(colors), fontsize=8, ncols=8, loc="outside lower center")
        plain(axes)
        save_figure(figure, path)

    def _plot_spectra(self, path: Path) -> None:
        """Draws singular values of targets and trained approximations, a panel per target."""
        from vlkr.reporting.figures import Line, lines, method_colors, panels, plain, save_figure

        colors = method_colors(self.methods)
        figure, grid = panels(len(self.targets), 3.5, 2.6, 3)
        for axes, (target, sigma) in zip(grid, self.spectra.items(), strict=True):
            lines(axes, [Line("target", range(len(sigma)), sigma, color="black")], linewidth=2)
            spectra = {m: self.row(target, m).spectrum for m in self.methods}
            shown = [Line(m, range(len(s)), s, color=colors[m]) for m, s in spectra.items() if s]
            lines(axes, shown, linewidth=1)
            axes.set_title(target, loc="left", fontsize=10)
            axes.set_xlabel("index", fontsize=8)
            axes.set_ylabel("singular value", fontsize=8)
            plain(axes)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        save_figure(figure, path)


def _numbers(values: Iterable[int]) -> str:
    return " ".join(f"{value:,}" for value in dict.fromkeys(values))


def _short(target: str) -> str:
    """Shortens a target's name and lets it wrap, so that a table of six fits into 80 columns.

    >>> _short("high-frequency"), _short("visual.transformer.resblocks.3.attn.in_proj_weight")
    ('high freq', 'visual ... in_proj_weight')
    """
    if target.count(".") > 1:
        return " ... ".join(target.split(".")[:: target.count(".")])
    return target.replace("frequency", "freq").replace("-", " ", 1)
