"""A grid's report: Markdown, CSV, LaTeX, JSON, CLIP_benchmark's JSON, PNG and one HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlkr.comparison.plan import slug
from vlkr.comparison.results import CellResult, GridResults
from vlkr.comparison.tables import (
    Difference,
    choice_table,
    cost_table,
    difference_table,
    failure_table,
)
from vlkr.files import write_json, write_text
from vlkr.reporting.page import html_page, latex_page, markdown_page
from vlkr.reporting.table import Table, caption

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

    exit_code = 0

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

    def tables(self) -> list[Table]:
        """Returns all tables."""
        return self.all_tables

    def lines(self) -> list[str]:
        """Returns the context, and where the report is."""
        page = self.output / "report.html"
        return [
            caption(self.context),
            f"Report: {page}, also .md, .tex, results.csv, results.json",
        ]

    def write(self) -> None:
        """Writes the report beside the cells: ``report.*``, ``results.*``, ``plots/`` etc."""
        output, about = self.output, caption(self.context)
        plots = {picture: output / "plots" / f"{picture.name}.png" for picture in self.pictures}
        paths = {picture.title: f"plots/{picture.name}.png" for picture in self.pictures}
        for picture, path in plots.items():
            picture.draw(path)
        images = {picture.title: path.read_bytes() for picture, path in plots.items()}
        write_json(output / "results.json", self.to_json())
        write_text(output / "results.csv", cells_csv(self.results))
        write_text(output / "report.md", markdown_page(self.title, about, self.all_tables, paths))
        write_text(output / "report.tex", latex_page(about, self.all_tables))
        write_text(output / "report.html", html_page(self.title, about, self.all_tables, images))
        for runs in self.results.selected:
            for result in runs.results:
                _write_clip_benchmark(runs.entry.method, result, output / "clip_benchmark")


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


def _write_clip_benchmark(method: str, result: CellResult, folder: Path) -> None:
    """A file per set, as ``clip_benchmark build`` reads them."""
    seed = "" if result.cell.seed is None else f"seed {result.cell.seed}"
    for name, record in result.sets.items():
        about = ", ".join(filter(None, (record["pretrained"], method, seed)))
        keys = ("dataset", "model", "task", "metrics", "language")
        value = {key: record[key] for key in keys} | {"pretrained": f"{about} ({result.cell.id})"}
        write_json(folder / f"{slug(result.cell.id, name)}.json", value)
