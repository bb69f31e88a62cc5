import json

import pytest
from helpers import COLORS, write_images

from vlkr.datasets import load_dataset
from vlkr.datasets.tables import read_table
from vlkr.errors import VlkrError

ROWS = [
    {"path": "photo/1.jpg", "label": "dog", "domain": "photo", "split": "train"},
    {"path": "photo/2.jpg", "label": "cat", "domain": "photo", "split": "test"},
    {"path": "art/1.jpg", "label": "cat", "domain": "art", "split": "train"},
]


def write_csv(folder, rows, name="t.csv"):
    columns = list(rows[0])
    lines = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    (folder / name).write_text("\n".join(",".join(line) for line in lines), encoding="utf-8")
    return folder / name


def write_jsonl(folder, rows, name="t.jsonl"):
    (folder / name).write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder / name


def without(*columns):
    return [{name: row[name] for name in row if name not in columns} for row in ROWS]


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_paths_labels_domains_and_splits(tmp_path, write):
    listing = read_table(write(tmp_path, ROWS))
    assert listing.classes == ("cat", "dog")
    assert listing.domains == ("art", "photo")
    assert listing.named_by == "names"
    assert {split: source.root for split, source in listing.splits.items()} == {
        "train": tmp_path,
        "test": tmp_path,
    }
    assert [tuple(file) for file in listing.splits["train"].files] == [
        ("photo/1.jpg", 1, "photo"),
        ("art/1.jpg", 0, "art"),
    ]
    assert [tuple(file) for file in listing.splits["test"].files] == [("photo/2.jpg", 0, "photo")]


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_domain_and_split_may_be_absent(tmp_path, write):
    listing = read_table(write(tmp_path, without("domain", "split")))
    assert listing.domains == ()
    assert [tuple(file) for file in listing.splits[""].files] == [
        ("photo/1.jpg", 1, None),
        ("photo/2.jpg", 0, None),
        ("art/1.jpg", 0, None),
    ]


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_numbers_are_labels(tmp_path, write):
    rows = [{"path": f"{i}.png", "label": 11 - i} for i in range(12)]
    listing = read_table(write(tmp_path, rows))
    assert listing.classes == tuple(str(i) for i in range(12))
    assert listing.named_by == "numbers"
    assert [file.label for file in listing.splits[""].files] == list(range(11, -1, -1))


def test_csv_with_quotes_and_a_byte_order_mark(tmp_path):
    text = '\ufefflabel,note,path\n"big, red",x,"a ""b"".png"\nblue,,c.png\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    listing = read_table(tmp_path / "t.csv")
    assert listing.classes == ("big, red", "blue")
    assert [tuple(file) for file in listing.splits[""].files] == [
        ('a "b".png', 0, None),
        ("c.png", 1, None),
    ]


def changed(**values):
    return [ROWS[0], ROWS[1] | values, ROWS[2]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(path="/etc/passwd"), r", line \d has path '/etc/passwd', expected one that is re"),
        (changed(path="../x.png"), r", line \d has path '\.\./x\.png', expected one that is rela"),
        (changed(path="photo/1.jpg"), r", line \d lists 'photo/1\.jpg' again, after .*, line \d"),
        (changed(path=""), r", line \d has no path"),
        (changed(label=""), r", line \d has no label"),
        (changed(domain=""), r", line \d has no domain, other lines have"),
        (changed(split=""), r", line \d has no split, other lines have"),
        (changed(split="dev"), r", line \d has split 'dev', expected train, val, test"),
        ([row | {"label": i + 1} for i, row in enumerate(ROWS)], "label 3 but not each from 0 on"),
        ([row | {"label": 2 * i} for i, row in enumerate(ROWS)], "label 4 but not each from 0 on"),
    ],
)
@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_bad_lines_are_told(tmp_path, write, rows, message):
    with pytest.raises(VlkrError, match=r"t\.\w+.*" + message):
        read_table(write(tmp_path, rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "t.csv has no column 'path', expected a heading with path and label"),
        ("t.csv", b"path\na.png\n", "t.csv has no column 'label'"),
        ("t.csv", b"path,label\n", "t.csv lists no image"),
        ("t.csv", b"path,label\n\xff,x\n", "cannot read .*t.csv: .*utf-8"),
        ("t.csv", b"path,label\na.png\n", "line 2 has no label"),
        ("t.csv", b"path,label\na,b," + b"x" * 200_000, "cannot read .*t.csv: field larger"),
        ("t.jsonl", b"", "t.jsonl lists no image"),
        ("t.jsonl", b"[1]", "t.jsonl, line 1 holds .1., expected an object"),
        ("t.jsonl", b'{"path": "a"}\n{', "t.jsonl, line 1 has no label"),
        ("t.jsonl", b'{"path": "a", "label": 1}\n{', "t.jsonl, line 2 is not valid JSON"),
        ("t.jsonl", b'{"path": "a", "label": 1.5}', "has label 1.5, expected a name or an integer"),
        ("t.jsonl", b'{"path": "a", "label": true}', "has label True, expected a name or an int"),
        ("t.jsonl", b'{"path": ["a"], "label": 1}', r"has path \['a'\], expected a text"),
        ("t.jsonl", b"[" * 100_000, "cannot read .*t.jsonl: .*recursion|holds"),
        ("t.json", b"[]", "t.json holds a list, expected a mapping"),
        ("t.json", b"{}", "t.json lists no image"),
        ("t.json", b'{"all": []}', "has split 'all', expected train, val, test"),
        ("t.json", b'{"train": []}', "split 'train' is no list of images"),
        ("t.json", b'{"train": {"a": 1}}', "split 'train' is no list of images"),
        ("t.json", b'{"train": [["a", 0]]}', r"train image 0 is \['a', 0\], expected \[path, lab"),
        ("t.json", b'{"train": [["a", "0", "x"]]}', r"expected \[path, label, class name\]"),
        ("t.json", b'{"train": [["a", true, "x"]]}', r"expected \[path, label, class name\]"),
        ("t.json", b'{"train": [["/a", 0, "x"]]}', "train image 0 has path '/a', expected one"),
    ],
)
def test_files_that_are_no_lists(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VlkrError, match=message):
        read_table(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(VlkrError, match=r"cannot read .*t\.csv: No such file"):
        read_table(tmp_path / "t.csv")


COOP = {
    "train": [["red/0.png", 0, "red"], ["blue/0.png", 1, "navy_blue"], ["red/1.png", 0, "red"]],
    "val": [["blue/1.png", 1, "navy_blue"]],
    "test": [["green/0.png", 2, "green"], ["red/2.png", 0, "red"]],
}


def write_coop(folder, content=COOP, name="split_zhou_Colors.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.mark.parametrize("images", ["", "images", "2750"])
def test_coops_split_file(tmp_path, images):
    write_images(tmp_path / "d" / images, per_class=3)
    (tmp_path / "d" / "annotations").mkdir()
    dataset = load_dataset(write_coop(tmp_path / "d"))
    assert dataset.name == "split_zhou_Colors"
    assert dataset.class_names == ("red", "navy blue", "green")
    for split, entries in COOP.items():
        samples = list(dataset.source(split))
        assert [(s.key, s.label) for s in samples] == [(path, label) for path, label, _ in entries]
        assert all(s.image == (tmp_path / "d" / images / s.key).read_bytes() for s in samples)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["green/1.png", 0, "crimson"], "test image 2 names label 0 'crimson', which is 'red' be"),
        (["red/1.png", 3, "red"], "has two labels for class 'red'"),
        (["red/1.png", 4, "gray"], "has 4 classes but none with label 3"),
        (["red/1.png", -1, "gray"], "has 4 classes but none with label 3"),
        (["red/2.png", 0, "red"], r"test image 2 lists 'red/2\.png' again"),
    ],
)
def test_labels_of_a_split_file_that_do_not_agree(tmp_path, entry, message):
    write_images(tmp_path / "d", per_class=3)
    content = COOP | {"test": [*COOP["test"], entry]}
    with pytest.raises(VlkrError, match=message):
        read_table(write_coop(tmp_path / "d", content))


def test_split_file_without_its_images(tmp_path):
    with pytest.raises(VlkrError, match=r"no image 'red/0\.png' beside .*split_zhou_Colors\.json"):
        read_table(write_coop(tmp_path / "d"))


def test_table_end_to_end(tmp_path):
    write_images(tmp_path, per_class=6)
    rows = [
        {"path": f"{name}/{i}.png", "label": name, "domain": "ab"[i % 2]}
        for name in COLORS
        for i in range(6)
    ]
    dataset = load_dataset(write_csv(tmp_path, rows, "colors.csv"))
    assert (dataset.name, dataset.class_names) == ("colors", ("blue", "green", "red"))
    assert dataset.domains == ("a", "b")
    train, test = ({s.key for s in dataset.source(split)} for split in ("train", "test"))
    assert not train & test
    assert train | test == {row["path"] for row in rows}
    only = dataset.select(domains=["b"])
    kept = {s.key for split in only.splits for s in only.source(split)}
    assert kept == {row["path"] for row in rows if row["domain"] == "b"}
