"""Tables in every form, against the standard library's readers."""

import csv
import io
import subprocess
import sys

import pytest
from rich.console import Console

from vlkr.reporting.table import Table, show

TABLE = Table("Title & co", ("method", "top-1 %"), (("a|b", "93.7 ± 1.5"), ("<i>[x](y)", "")), "n")


def test_markdown_escapes_names():
    header, rule, first, second = TABLE.markdown().splitlines()
    assert header == "| method | top-1 % |"
    assert rule == "|---|---:|"
    assert first == r"| a\|b | 93.7 ± 1.5 |"
    assert second == r"| &lt;i>\[x](y) |  |"


def test_csv_is_read_back():
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows == [list(TABLE.header), *map(list, TABLE.rows)]


def test_latex_has_a_caption_and_a_row_per_row():
    text = TABLE.latex()
    assert r"\caption{Title \& co. n.}" in text
    assert r"\begin{tabular}{lr}" in text
    assert r"a|b & 93.7 $\pm$ 1.5 \\" in text


def test_rows_as_long_as_the_header_are_needed():
    with pytest.raises(ValueError, match="row 2 has 1 cell, expected 2"):
        Table.of("", [["a", "b"], ["1", "2"], ["3"]])


def test_a_number_is_never_wrapped_and_a_name_is_not_markup():
    console = Console(file=io.StringIO(), width=26)
    console.print(Table("", ("name", "a long header"), (("[red]x", "93.7 ± 1.5"),)).rich())
    text = console.file.getvalue()
    assert "93.7 ± 1.5" in text
    assert "[red]x" in text


class Answer:
    exit_code = 0

    def tables(self):
        return [TABLE, Table("hidden", ("h",), (("c",),), brief=False)]

    def lines(self):
        return ["written: [runs]\x1b[31m"]

    def to_json(self):
        return {}


def test_show_prints_brief_tables_then_lines():
    console = Console(file=io.StringIO(), width=80)
    show(Answer(), console)
    text = console.file.getvalue()
    assert "Title & co" in text
    assert "hidden" not in text
    assert r"written: [runs]\x1b[31m" in text


def test_reporting_imports_no_torch():
    code = "import vlkr.reporting.table, vlkr.reporting.page, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
