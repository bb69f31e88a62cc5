"""A report's tables and figures as Markdown, LaTeX, and one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader

from vlkr.reporting.table import Table, markdown_text


def html_page(
    title: str, context: str, tables: Sequence[Table], figures: Mapping[str, bytes]
) -> str:
    """Returns an HTML page that loads nothing from elsewhere.

    Args:
        title: heading.
        context: what the numbers depend on.
        tables: shown in order; a click on a header sorts by its column.
        figures: PNG by title.
    """
    environment = Environment(autoescape=True, loader=PackageLoader("vlkr.reporting", ""))
    encoded = {name: base64.b64encode(png).decode() for name, png in figures.items()}
    template = environment.get_template("report.html.j2")
    return template.render(title=title, context=context, tables=tables, figures=encoded)


def markdown_page(
    title: str, context: str, tables: Sequence[Table], figures: Mapping[str, str]
) -> str:
    """Returns a Markdown page.

    Args:
        title: heading.
        context: what the numbers depend on.
        tables: shown in order, each under its title.
        figures: relative path by title.
    """
    parts = [f"# {markdown_text(title)}\n\n{markdown_text(context)}.\n"]
    for table in tables:
        note = f"\n{markdown_text(table.note)}.\n" if table.note else ""
        parts.append(f"## {markdown_text(table.title)}\n\n{table.markdown()}{note}")
    parts += [
        f"## {markdown_text(name)}\n\n![{markdown_text(name)}]({path})\n"
        for name, path in figures.items()
    ]
    return "\n".join(parts)


def latex_page(context: str, tables: Sequence[Table]) -> str:
    """Returns the tables for a paper; they need the package booktabs."""
    return "\n".join([f"% {context}\n", *(table.latex() for table in tables)])
