"""The page on its own, and in a browser where there is one."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from vlkr.reporting.page import html_page
from vlkr.reporting.table import Table

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EVIL = '<img src=x onerror="document.title=1">&"\''


class Page(HTMLParser):
    """Tables' texts, pictures and every address."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.pictures, self.addresses, self.tags, self.cell = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href", "action") if name in found]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""
        elif tag == "img":
            self.pictures.append(found)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def png():
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def page():
    rows = [[EVIL, "top-1 %"], ["lora", "9.5 ± 1"], [EVIL, "10.5"], ["probe", ""], ["full", "-2.0"]]
    return html_page(
        EVIL, EVIL, [Table(EVIL, rows[0], rows[1:], note) for note in (EVIL, "")], {EVIL: png()}
    )


def test_everything_is_escaped_and_comes_back(page):
    found = Page(page)
    assert found.tags.count("img") == 1
    assert [len(table) for table in found.tables] == [5, 5]
    assert found.tables[0][2] == [EVIL, "10.5"]
    assert found.pictures[0]["alt"] == EVIL
    assert EVIL not in page


def test_nothing_is_fetched(page):
    found = Page(page)
    assert [a.split(",")[0] for a in found.addresses] == ["data:image/png;base64"]
    assert base64.b64decode(found.addresses[0].split(",")[1]) == png()
    assert not re.findall(r"https?://|url\(|@import", page)
    assert "default-src 'none'" in page


LOOK = """
<script>
addEventListener("load", () => {
const look = {
  pictures: [...document.images].map(
    i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
  tables: [...document.querySelectorAll("table")].map(t => [t.tBodies[0].rows.length,
    t.getBoundingClientRect().height, getComputedStyle(t).visibility]),
  orders: [],
};
const table = document.querySelector("table");
for (const column of [1, 1, 0]) {
  table.querySelectorAll("thead button")[column].click();
  look.orders.push([...table.tBodies[0].rows].map(row => row.cells[0].textContent));
}
look.sort = table.querySelectorAll("th")[0].getAttribute("aria-sort");
look.title = document.title;
const out = document.createElement("pre");
out.id = "look";
out.textContent = JSON.stringify(look);
document.body.append(out);
});
</script>
"""


def browse(path, folder, *arguments):
    """Opens a page without a window."""
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1200,3000",
            *arguments,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def looked_at(text, folder):
    """What a browser says of the page once it is shown."""
    path = folder / "page.html"
    path.write_text(text.replace("</body>", f"{LOOK}</body>"))
    found = re.search(r'<pre id="look">(.*?)</pre>', browse(path, folder, "--dump-dom"), re.S)
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_shows_and_sorts(page, tmp_path):
    look = looked_at(page, tmp_path)
    assert look["title"] == EVIL
    assert look["pictures"] == [[True, 40, 40]]
    assert [rows for rows, height, _ in look["tables"] if height > 50] == [4, 4]
    down = [EVIL, "lora", "full", "probe"]  # by number, the empty cell last
    up = ["full", "lora", EVIL, "probe"]
    assert look["orders"][:2] == [down, up]
    assert look["sort"] == "descending"
    assert sorted(look["orders"][2]) == sorted(down)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_shows_every_table_and_plot_of_a_report(options, colors, tmp_path):
    from grids import compare

    shifts = [str(colors.parent / name) for name in ("more", "two")]
    methods = ["zero-shot", "probe", "kradapter", "lora"]
    report = compare(
        tmp_path / "out", shifts=shifts, shots=[1, 2], methods=methods, spectra=True, **options
    )
    page = report.output / "report.html"
    look = looked_at(page.read_text(), tmp_path)
    assert len(look["tables"]) == len(report.all_tables)
    assert all(
        rows > 0 and height > 40 and shown == "visible" for rows, height, shown in look["tables"]
    )
    assert {p.name for p in (report.output / "plots").iterdir()} == {
        "home-against-shift.png",
        "reliability.png",
        "sets.png",
        "shots.png",
        "spectra.png",
    }
    assert len(look["pictures"]) == 5
    assert all(complete and own > 300 and shown > 300 for complete, own, shown in look["pictures"])
    browse(page, tmp_path, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 50
