"""One table for the terminal, Markdown, LaTeX, CSV and HTML, and what a command returns."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import rich.table
from rich.console import Console
from rich.text import Text

from vlkr.errors import printable


@dataclass(frozen=True)
class Table:
    """A table of formatted cells.

    Attributes:
        title: shown above.
        header: column names; the first column is left-aligned, the others right-aligned.
        rows: cells, as many per row as the header has.
        note: shown below, without a final period.
        brief: whether the terminal shows the table too, not only the report.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    brief: bool = True

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows, 1):
            if len(row) != len(self.header):
                cells = f"{len(row)} cell{'' if len(row) == 1 else 's'}"
                raise ValueError(f"row {i} has {cells}, expected {len(self.header)}")

    @classmethod
    def of(
        cls, title: str, rows: Sequence[Sequence[str]], note: str = "", *, brief: bool = True
    ) -> Table:
        """Makes a table of rows whose first is the header."""
        header, *cells = (tuple(row) for row in rows)
        return cls(title, header, tuple(cells), note, brief)

    def rich(self) -> rich.table.Table:
        """Returns the table for the terminal."""
        table = rich.table.Table(
            title=Text(printable(self.title)) if self.title else None,
            caption=Text(printable(self.note)) if self.note else None,
            title_justify="left",
            caption_justify="left",
        )
        for i, name in enumerate(self.header):
            cells = [row[i] for row in self.rows if row[i]]
            if i == 0:
                table.add_column(Text(printable(name)), no_wrap=True)
            elif all(cell[0].isdigit() or cell[0] in "+-<?" for cell in cells):
                width = max(map(len, cells), default=0)  # a header may wrap, a number may not
                table.add_column(Text(printable(name)), justify="right", min_width=width)
            else:
                table.add_column(Text(printable(name)))
        for row in self.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        return table

    def markdown(self) -> str:
        """Returns the header and rows as a Markdown table, without title and note."""
        rows = [self.header, *self.rows]
        cells = [[markdown_text(cell).replace("|", "\\|") for cell in row] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        rule = ("---" if i == 0 else "---:" for i in range(len(self.header)))
        lines.insert(1, f"|{'|'.join(rule)}|")
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Returns a LaTeX ``table`` that needs the package booktabs."""
        header, *rows = ([latex_text(cell) for cell in row] for row in (self.header, *self.rows))
        caption = ". ".join(filter(None, (self.title, self.note)))
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(caption)}.}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Returns the header and rows as CSV."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([self.header, *self.rows])
        return stream.getvalue()


class Result(Protocol):
    """What a command returns: tables and lines for a person, JSON for a program."""

    @property
    def exit_code(self) -> int:
        """Exit status of the command; 0 unless the result itself reports a problem."""
        ...

    def tables(self) -> list[Table]:
        """Returns the tables, those of the report included."""
        ...

    def lines(self) -> list[str]:
        """Returns what is printed after the tables."""
        ...

    def to_json(self) -> Any:
        """Returns everything as plain JSON."""
        ...


def show(result: Result, console: Console) -> None:
    """Prints a result's brief tables and its lines."""
    for table in result.tables():
        if table.brief:
            console.print(table.rich())
    for line in result.lines():
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def markdown_text(text: str) -> str:
    r"""Escapes tags and links, and removes line breaks and control characters.

    >>> markdown_text("<b>[x]")
    '&lt;b>\\[x]'
    """
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")


def latex_text(text: str) -> str:
    r"""Escapes LaTeX's special characters.

    >>> print(latex_text("lora_2 & 94.1 ± 0.3 %"))
    lora\_2 \& 94.1 $\pm$ 0.3 \%
    """
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
    return re.sub(r"[\\~^±<>&%$#_{}]", lambda match: special.get(match[0], f"\\{match[0]}"), text)


def percent(value: float, digits: int = 1) -> str:
    """Formats a fraction in percent.

    >>> percent(0.5)
    '50.0'
    """
    return f"{100 * value:.{digits}f}"


def mean_std(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Formats the mean and, of several values, the standard deviation; in percent by default.

    >>> mean_std([0.5, 0.7]), mean_std([0.5]), mean_std([])
    ('60.0 ± 14.1', '50.0', '')
    """
    if not values:
        return ""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def value_range(values: Collection[int | None], unknown: str = "") -> str:
    """Formats one number, or the smallest and the largest; None is an unknown value.

    >>> value_range([10, 1000, 10]), value_range([7]), value_range([None], "unknown")
    ('10 to 1,000', '7', 'unknown')
    """
    known = sorted({value for value in values if value is not None})
    ends = dict.fromkeys([known[0], known[-1]]) if known else {}
    return " to ".join(f"{value:,}" for value in ends) or unknown


def caption(context: Mapping[str, Any]) -> str:
    """Formats what numbers depend on in one line; None is left out, the weights' hash shortened.

    >>> caption({"model": "tiny", "pretrained": None, "shots": 16})
    'model tiny, shots 16'
    """
    context = dict(context)
    if isinstance(context.get("weights_sha256"), str):
        context["weights_sha256"] = context["weights_sha256"][:12]
    parts = (f"{key} {value}" for key, value in context.items() if value is not None)
    return printable(", ".join(parts))
