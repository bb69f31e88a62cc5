import json

import numpy as np
import pytest
from helpers import COLORS, color_image, write_images
from PIL import Image

from vlkr.cli import main
from vlkr.datasets.cards import card_names, load_card
from vlkr.datasets.catalog import list_cards
from vlkr.datasets.inspect import info
from vlkr.datasets.packing import pack
from vlkr.errors import VlkrError


@pytest.fixture
def domains(tmp_path):
    """Two domains, 3 and 5 images a class, of which some are JPEG of another size."""
    for domain, number in (("art", 3), ("photo", 5)):
        for c, name in enumerate(COLORS):
            folder = tmp_path / "tree" / domain / name
            folder.mkdir(parents=True)
            for i in range(number):
                if i:
                    (folder / f"{i}.png").write_bytes(color_image(name, 100 * c + i))
                else:
                    Image.new("RGB", (40, 30), COLORS[name]).save(folder / "0.jpg")
    return tmp_path / "tree"


def total(by_split, *path):
    numbers = []
    for content in by_split.values():
        for step in path:
            content = content.get(step, {})
        numbers.append(content or 0)
    return sum(numbers)


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_by_class_and_domain(domains, workers):
    result = info(str(domains), num_workers=workers)
    splits = result.to_json()["splits"]
    for name in COLORS:
        assert total(splits, "counts", name, "art") == 3
        assert total(splits, "counts", name, "photo") == 5
    assert total(splits, "formats", "jpg") == 6
    assert total(splits, "formats", "png") == 18
    files = [path for path in domains.rglob("*") if path.is_file()]
    assert total(splits, "bytes") == sum(path.stat().st_size for path in files)
    by_class, by_domain = result.tables()
    assert sum(map(int, {r[0]: r[1:] for r in by_domain.rows}["art"])) == 9
    assert sum(map(int, by_class.rows[0][1:])) == 8


def test_pixels_are_least_median_and_largest(tmp_path):
    root = write_images(tmp_path / "d", per_class=1, splits=("test",))
    for i, size in enumerate(((10, 50), (30, 5))):
        Image.new("RGB", size).save(root / "test" / "red" / f"new{i}.png")
    sides = info(str(root)).splits["test"].sides()
    assert sides["width"] == [10, np.median([20, 20, 20, 10, 30]), 30]
    assert sides["height"] == [5, np.median([20, 20, 20, 50, 5]), 50]


def test_packing_does_not_change_the_numbers(domains, tmp_path):
    pack(str(domains), tmp_path / "shards")
    before, after = info(str(domains)).to_json(), info(str(tmp_path / "shards")).to_json()
    assert before["splits"] == after["splits"]
    assert before["domains"] == after["domains"] == ["art", "photo"]


def test_bad_samples_are_counted(domains):
    (domains / "art" / "red" / "1.png").write_bytes(b"no image")
    assert sum(split.bad for split in info(str(domains)).splits.values()) == 1


def test_contact_sheet_shows_each_class_in_its_row(domains, tmp_path):
    result = info(str(domains), output=tmp_path / "sheet.png")
    assert result.to_json()["contact_sheet"] == str(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    height = sheet.shape[0] // 3
    for row, name in enumerate(result.dataset.class_names):
        part = sheet[row * height + 14 : row * height + 14 + 96]
        colored = part[np.ptp(part, axis=2) > 60]  # neither white nor black
        assert len(colored) > 1.5 * 96 * 96
        assert (colored.argmax(1) == np.argmax(COLORS[name])).mean() > 0.95


def test_contact_sheet_survives_a_bad_image(domains, tmp_path):
    for path in domains.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    info(str(domains), output=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()


def test_output_must_be_a_png(domains, tmp_path):
    with pytest.raises(VlkrError, match=r"sheet\.jpg must end in .png"):
        info(str(domains), output=tmp_path / "sheet.jpg")


def test_command(domains, capsys):
    assert main(["data", "info", str(domains)]) == 0
    out = capsys.readouterr().out
    for word in ("red", "photo", "jpg", "median"):
        assert word in out
    assert main(["data", "info", str(domains), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dataset"] == "tree"


def test_all_cards_are_listed(capsys):
    assert main(["data", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == card_names()
    digits = listed["digits"]
    assert digits["classes"] == 10
    assert digits["place"].endswith("data/digits")
    assert (digits["title"], digits["licence"]) == (load_card("digits").title, "CC BY 4.0")
    assert digits["source"]


@pytest.mark.parametrize(("columns", "sources"), [(80, False), (160, True)])
def test_the_list_of_cards_fits_the_terminal(columns, sources, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert ("source" in out.splitlines()[1]) == sources
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    places = {row[0].strip(): row[-1].strip() for row in rows if row[-1].strip()}
    assert set(places) == set(card_names())
    assert set(places.values()) <= {"here", "stream", "no"}


def test_cards_whose_data_lies_in_vlkr_data(tmp_path, monkeypatch):
    absent = [c.name for c in list_cards().cards if not c.shards]
    if not absent:
        pytest.skip("every card ships its data")
    assert list_cards().to_json()[absent[0]]["place"] is None
    monkeypatch.setenv("VLKR_DATA", str(tmp_path))
    (tmp_path / absent[0]).mkdir()
    assert list_cards().to_json()[absent[0]]["place"] == str(tmp_path / absent[0])


def test_cards_of_a_suite():
    for card in list_cards("coop").cards:
        assert "coop" in card.suites
    with pytest.raises(VlkrError, match="unknown suite 'cop', expected one of coop, kradapter"):
        list_cards("cop")
