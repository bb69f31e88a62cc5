"""A grid's report: Markdown, CSV, LaTeX, JSON, CLIP_benchmark's JSON, PNG and one HTML page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vlkr.comparison.plan import slug
from vlkr.comparison.results import CellResult, GridResults
from vlkr.comparison.tables import (
    Difference,
    choice_table,
    cost_table,
    difference_table,
    failure_table,
)
from vlkr.evaluation.report import markdown_table, rich_table
from vlkr.files import write_json, write_text
from vlkr.reporting.page import html_page
from vlkr.reporting.table import Table

DIFFERENCES = (
    "Paired by seed and by image; interval: bootstrap over seeds and images, 10,000 draws; p: "
    "McNemar's exact test, over several seeds twice their median"
)


@dataclass(frozen=True)
class Picture:
    """A plot of a report: name of its file, title and what draws it into a file."""

    name: str
    title: str
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Report:
    """The results of a grid, as they are shown and written.

    Attributes:
        title: title of the page.
        all_tables: in order.
        pictures: in order.
        differences: to the method of reference.
        results: all that the tables are made of.
        output: folder of the grid.
    """

    title: str
    all_tables: list[Table]
    pictures: list[Picture]
    differences: list[Difference]
    results: GridResults
    output: Path

    @property
    def context(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return self.results.context()

    def caption(self) -> str:
        """The context in one line."""
        return ", ".join(f"{key} {value}" for key, value in self.context.items())

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program: each method in each place, seed by seed."""
        return {
            "title": self.title,
            **self.context,
            "entries": [
                {
                    "method": runs.entry.method,
                    **runs.entry.place,
                    "setting": runs.chosen.setting if runs.chosen else None,
                    "seeds": runs.seeds,
                    "parameters": [result.record["parameters"] for result in runs.results],
                    "sets": {
                        name: {
                            metric: runs.values(name, metric)
                            for metric in runs.results[0].sets[name]["metrics"]
                        }
                        for name in (runs.entry.sets if runs.results else ())
                    },
                }
                for runs in self.results.selected
            ],
            "differences": [difference.to_json() for difference in self.differences],
            "failures": self.results.failures,
            "unfinished": self.results.unfinished,
        }

    def show(self, console: Console) -> None:
        """Prints the main tables, their context and where the rest is."""
        for table in self.all_tables:
            if table.brief:
                cells = [list(row) for row in (table.header, *table.rows)]
                console.print(rich_table(cells, table.title, table.note))
        console.print(self.caption(), style="dim", highlight=False, markup=False)
        page = self.output / "report.html"
        note = "also .md, .tex, results.csv, results.json"
        console.print(f"Report: {page}, {note}", highlight=False, markup=False)

    def write(self) -> None:
        """Writes the report beside the cells: ``report.*``, ``results.*``, ``plots/`` etc."""
        output = self.output
        write_json(output / "results.json", self.to_json())
        write_text(output / "report.md", markdown(self))
        write_text(output / "report.tex", latex(self.all_tables, self.caption()))
        write_text(output / "results.csv", cells_csv(self.results))
        for runs in self.results.selected:
            for result in runs.results:
                _write_clip_benchmark(runs.entry.method, result, output / "clip_benchmark")
        pictures: dict[str, bytes] = {}
        for picture in self.pictures:
            path = output / "plots" / f"{picture.name}.png"
            picture.draw(path)
            pictures[picture.title] = path.read_bytes()
        page = html_page(self.title, self.caption(), self.all_tables, pictures)
        write_text(output / "report.html", page)


def standard_report(
    results: GridResults,
    output: Path,
    title: str,
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    differences: Sequence[Difference],
    *,
    main_differences: Sequence[Difference] | None = None,
    more_tables: Sequence[Table] = (),
    note: str = "",
) -> Report:
    """Returns the report of a grid: its own tables, and those that every grid has.

    Args:
        results: of the grid.
        output: folder of the grid.
        title: title of the page.
        tables: accuracies, which come first.
        pictures: plots.
        differences: to the method of reference.
        main_differences: those that the terminal shows; all by default.
        more_tables: come last.
        note: more to say below the tables of differences and of choices.
    """
    reference = results.plan.reference
    main = differences if main_differences is None else main_differences
    all_tables = [*tables]
    if main:
        heading = f"Difference to {reference}"
        all_tables.append(difference_table(main, reference, heading, f"{DIFFERENCES}{note}"))
    all_tables.append(cost_table(results))
    if choices := choice_table(results, note):
        all_tables.append(choices)
    if len(differences) > len(main):
        heading = "Differences, set by set"
        all_tables.append(
            difference_table(differences, reference, heading, f"{DIFFERENCES}{note}", brief=False)
        )
    all_tables += more_tables
    if failed := failure_table(results):
        all_tables.append(failed)
    return Report(title, all_tables, [*pictures], [*differences], results, output)


def markdown(report: Report) -> str:
    """The tables and their context as a Markdown page."""
    parts = [f"# {report.title}\n\n{report.caption()}.\n"]
    for table in report.all_tables:
        note = f"\n{table.note}.\n" if table.note else ""
        cells = [list(row) for row in (table.header, *table.rows)]
        parts.append(f"## {table.title}\n\n{markdown_table(cells)}{note}")
    parts += [
        f"## {picture.title}\n\n![{picture.title}](plots/{picture.name}.png)\n"
        for picture in report.pictures
    ]
    return "\n".join(parts)


def cells_csv(results: GridResults) -> str:
    """Returns CSV with a row for every finished cell and set, chosen or not."""
    rows: list[dict[str, Any]] = []
    for runs in results.selected:
        for candidate in runs.entry.candidates:
            for cell in candidate.cells:
                if cell not in results.cells:
                    continue
                result = results.cells[cell]
                costs = ("val_acc1", "parameters", "train_seconds", "seconds")
                rows += [
                    {
                        "method": runs.entry.method,
                        **runs.entry.place,
                        **candidate.setting,
                        "seed": result.cell.seed,
                        "chosen": candidate is runs.chosen,
                        "set": name,
                        "images": result.sets[name]["images"],
                        "templates": result.sets[name]["templates"],
                        **result.sets[name]["metrics"],
                        **{
                            key: result.record[key]
                            for key in (*costs, "peak_memory_mib", "weights_sha256")
                        },
                        "cell": cell,
                    }
                    for name in runs.entry.sets
                ]
    stream = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def latex(tables: Sequence[Table], caption: str) -> str:
    """The tables for a paper; they need the package booktabs."""
    parts = [f"% {caption}\n"]
    for table in tables:
        header, *rows = ([_latex(cell) for cell in row] for row in (table.header, *table.rows))
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex('. '.join(filter(None, (table.title, table.note))))}.}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _latex(text: str) -> str:
    r"""Text as LaTeX sets it.

    >>> print(_latex("lora_2 & 94.1 ± 0.3 %"))
    lora\_2 \& 94.1 $\pm$ 0.3 \%
    """
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
    return re.sub(r"[\\~^±<>&%$#_{}]", lambda m: special.get(m[0], f"\\{m[0]}"), text)


def _write_clip_benchmark(method: str, result: CellResult, folder: Path) -> None:
    """A file per set, as ``clip_benchmark build`` reads them."""
    seed = "" if result.cell.seed is None else f"seed {result.cell.seed}"
    for name, record in result.sets.items():
        about = ", ".join(filter(None, (record["pretrained"], method, seed)))
        keys = ("dataset", "model", "task", "metrics", "language")
        value = {key: record[key] for key in keys} | {"pretrained": f"{about} ({result.cell.id})"}
        write_json(folder / f"{slug(result.cell.id, name)}.json", value)
