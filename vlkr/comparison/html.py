"""One page that holds everything, and fetches nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from vlkr.comparison.tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1c1c1c; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
.context, .note { color: #555; font-size: .9rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #555 }
thead button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0;
  cursor: pointer; color: inherit }
th[aria-sort=ascending] button::after { content: " \\25B2" }
th[aria-sort=descending] button::after { content: " \\25BC" }
tbody tr:hover { background: #f3f6f9 }
img { max-width: 100%; height: auto }
"""

# Sorts by the number that a cell begins with, by text where there is none; empty cells stay last.
_SCRIPT = """
for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => {
    const th = button.parentElement, body = th.closest("table").tBodies[0];
    const down = th.getAttribute("aria-sort") === "descending";
    for (const other of th.parentElement.children) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "ascending" : "descending");
    const text = row => row.cells[th.cellIndex].textContent.trim();
    const value = row => parseFloat(text(row).replace(/,/g, "").replace(/^</, ""));
    const order = (a, b) => isNaN(value(a)) || isNaN(value(b))
      ? text(a).localeCompare(text(b)) : value(a) - value(b);
    const rows = [...body.rows];
    rows.sort((a, b) => !text(a) - !text(b) || (down ? order(a, b) : order(b, a)));
    body.append(...rows);
  });
"""


def html_page(
    title: str, context: str, tables: Sequence[Table], pictures: Mapping[str, bytes]
) -> str:
    """The report as one HTML page without references to anything outside.

    Args:
        title: of the page.
        context: what the numbers depend on.
        tables: sortable by a click on their header.
        pictures: PNG by title.
    """
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="context">{escape(context)}.</p>']
    parts += map(_table, tables)
    parts += [
        f"<section><h2>{escape(name)}</h2>"
        f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        "</section>"
        for name, png in pictures.items()
    ]
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col"><button>{escape(cell)}</button></th>' for cell in table.header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}.</p>' if table.note else ""
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="scroll"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>{note}</section>"
    )
