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

from vlkr.comparison.outcomes import Collected, Result
from vlkr.comparison.plan import slug
from vlkr.comparison.tables import Difference, Table, failure_table
from vlkr.evaluation.report import markdown_table, rich_table
from vlkr.files import write_json, write_text
from vlkr.reporting import table as reporting
from vlkr.reporting.page import html_page

#: draws a picture into a file.
Draw = Callable[[Path], None]


@dataclass(frozen=True)
class Picture:
    """A plot of a report: name of its file, title and what draws it."""

    name: str
    title: str
    draw: Draw


@dataclass
class Report:
    """What a grid found, as it is shown and written.

    Attributes:
        title: of the page.
        context: what the numbers depend on.
        tables: in order.
        pictures: in order.
        differences: to the method of reference.
        collected: all that the tables are made of.
        output: folder of the grid.
    """

    title: str
    context: dict[str, Any]
    tables: list[Table]
    pictures: list[Picture]
    differences: list[Difference]
    collected: Collected
    output: Path

    def caption(self) -> str:
        """The context in one line."""
        return ", ".join(f"{key} {value}" for key, value in self.context.items())

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program: what each method reached in each place, seed by seed."""
        return {
            "title": self.title,
            **self.context,
            "entries": [
                {
                    "method": outcome.entry.method,
                    **outcome.entry.place,
                    "setting": outcome.chosen.setting if outcome.chosen else None,
                    "seeds": outcome.seeds,
                    "parameters": [result.found["parameters"] for result in outcome.results],
                    "sets": {
                        name: {
                            metric: outcome.values(name, metric)
                            for metric in outcome.results[0].sets[name]["metrics"]
                        }
                        for name in outcome.entry.sets
                    }
                    if outcome.results
                    else {},
                }
                for outcome in self.collected.outcomes
            ],
            "differences": [difference.to_json() for difference in self.differences],
            "failures": self.collected.failures,
            "unfinished": self.collected.unfinished,
        }

    def show(self, console: Console) -> None:
        """Prints the main tables, their context and where the rest lies."""
        for table in self.all_tables():
            if table.brief:
                console.print(rich_table(table.rows, table.title, table.note))
        console.print(self.caption(), style="dim", highlight=False, markup=False)
        page = self.output / "report.html"
        note = "also .md, .tex, results.csv, results.json"
        console.print(f"Report: {page}, {note}", highlight=False, markup=False)

    def all_tables(self) -> list[Table]:
        """The tables, and at their end what failed."""
        failed = failure_table(self.collected)
        return [*self.tables, *([Table("Failed or not finished", failed)] if failed else [])]


def write_report(report: Report) -> None:
    """Writes the report beside the cells: ``report.*``, ``results.*``, ``plots/`` and so on."""
    output = report.output
    write_json(output / "results.json", report.to_json())
    write_text(output / "report.md", markdown(report))
    write_text(output / "report.tex", latex(report.all_tables(), report.caption()))
    write_text(output / "results.csv", records(report.collected))
    for outcome in report.collected.outcomes:
        for result in outcome.results:
            _write_clip_benchmark(outcome.entry.method, result, output / "clip_benchmark")
    pictures: dict[str, bytes] = {}
    for picture in report.pictures:
        path = output / "plots" / f"{picture.name}.png"
        picture.draw(path)
        pictures[picture.title] = path.read_bytes()
    tables = [reporting.Table.of(t.title, t.rows, t.note) for t in report.all_tables()]
    page = html_page(report.title, report.caption(), tables, pictures)
    write_text(output / "report.html", page)


def markdown(report: Report) -> str:
    """The tables and their context as a Markdown page."""
    parts = [f"# {report.title}\n\n{report.caption()}.\n"]
    for table in report.all_tables():
        note = f"\n{table.note}.\n" if table.note else ""
        parts.append(f"## {table.title}\n\n{markdown_table(table.rows)}{note}")
    parts += [
        f"## {picture.title}\n\n![{picture.title}](plots/{picture.name}.png)\n"
        for picture in report.pictures
    ]
    return "\n".join(parts)


def records(collected: Collected) -> str:
    """CSV with a row for every finished cell and set, chosen or not."""
    rows: list[dict[str, Any]] = []
    for outcome in collected.outcomes:
        for candidate in outcome.entry.candidates:
            for cell in candidate.cells:
                if cell not in collected.results:
                    continue
                result = collected.results[cell]
                rows += [
                    {
                        "method": outcome.entry.method,
                        **outcome.entry.place,
                        **candidate.setting,
                        "seed": result.cell.seed,
                        "chosen": candidate is outcome.chosen,
                        "set": name,
                        "images": result.sets[name]["images"],
                        "templates": result.sets[name]["templates"],
                        **result.sets[name]["metrics"],
                        "val_acc1": result.found["val_acc1"],
                        "parameters": result.found["parameters"],
                        "train_seconds": result.found["train_seconds"],
                        "seconds": result.found["seconds"],
                        "peak_memory_mib": result.found["peak_memory_mib"],
                        "weights_sha256": result.found["weights_sha256"],
                        "cell": cell,
                    }
                    for name in outcome.entry.sets
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
        header, *rows = ([_latex(cell) for cell in row] for row in table.rows)
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


def _write_clip_benchmark(method: str, result: Result, folder: Path) -> None:
    """A file a set, as ``clip_benchmark build`` reads them."""
    context = [method, "" if result.cell.seed is None else f"seed {result.cell.seed}"]
    keys = ("dataset", "model", "task", "metrics", "language")
    for name, found in result.sets.items():
        about = ", ".join([found["pretrained"] or "", *filter(None, context)]).lstrip(", ")
        value = {key: found[key] for key in keys} | {"pretrained": f"{about} ({result.cell.id})"}
        write_json(folder / f"{slug(result.cell.id, name)}.json", value)
