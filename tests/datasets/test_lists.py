import json
import os
import shutil

import pytest
from helpers import COLORS, REAL, color_image, write_images

from vlkr.datasets import load_dataset
from vlkr.datasets.lists import image_files, read_listing
from vlkr.errors import VlkrError


def entries(source):
    return [tuple(file) for file in source.files]


# Folders


def write_domains(root, domains=("photo", "sketch"), per_class=2, splits=("",)):
    places = [f"{split}/{domain}".lstrip("/") for split in splits for domain in domains]
    return write_images(root, per_class, splits=places)


def test_one_folder_per_class(tmp_path):
    listing = read_listing(write_images(tmp_path / "d", per_class=2))
    assert listing.classes == ("blue", "green", "red")
    assert (listing.domains, listing.named_by) == ((), "folders")
    assert entries(listing.splits[""]) == [
        (f"{name}/{i}.png", label, None)
        for label, name in enumerate(sorted(COLORS))
        for i in range(2)
    ]


def test_splits_above(tmp_path):
    root = write_images(tmp_path / "d", per_class=1, splits=("test", "train", "val"))
    listing = read_listing(root)
    assert list(listing.splits) == ["train", "val", "test"]
    for split, source in listing.splits.items():
        assert source.root == root / split
        assert [file.path for file in source.files] == ["blue/0.png", "green/0.png", "red/0.png"]


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_domains_above(tmp_path, splits):
    listing = read_listing(write_domains(tmp_path / "d", splits=splits))
    assert (listing.classes, listing.domains) == (("blue", "green", "red"), ("photo", "sketch"))
    assert tuple(listing.splits) == splits
    for source in listing.splits.values():
        assert entries(source) == [
            (f"{domain}/{name}/{i}.png", label, domain)
            for domain in ("photo", "sketch")
            for label, name in enumerate(sorted(COLORS))
            for i in range(2)
        ]


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
def test_pacs_is_found_to_have_domains():
    listing = read_listing(REAL / "pacs")
    assert listing.domains == ("art_painting", "cartoon", "photo", "sketch")
    names = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    assert listing.classes == names
    files = listing.splits[""].files
    assert len(files) == 4 * 7 * 40
    assert all(file.path.startswith(f"{file.domain}/{names[file.label]}/") for file in files)


def test_images_at_any_depth_of_a_class_that_are_not_hidden(tmp_path):
    root = write_images(tmp_path / "d", per_class=1)
    for path in ("red/deeper/UPPER.PNG", "red/.hidden/0.png", "red/._0.png", "red/notes.txt"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"x")
    (root / ".git").mkdir()
    (root / "blue").rename(tmp_path / "linked")
    (root / "blue").symlink_to(tmp_path / "linked")
    assert image_files(root / "red") == ["0.png", "deeper/UPPER.PNG"]
    assert len(read_listing(root).splits[""].files) == 4


def test_folders_below_a_class_are_not_classes(tmp_path):
    # One has an image of its own; the others have a folder in common, but not two.
    root = write_images(tmp_path / "a", 1, splits=["dog", "cat"])
    (root / "dog" / "0.png").write_bytes(color_image("red", 0))
    assert read_listing(root).classes == ("cat", "dog")
    root = write_images(tmp_path / "b", 1, names=["red", "green"], splits=["dog"])
    write_images(root, 1, names=["red", "blue"], splits=["cat"])
    assert read_listing(root).classes == ("cat", "dog")


def test_folders_with_numbers_are_labels(tmp_path):
    root = write_images(tmp_path / "d", per_class=1, names=["red"])
    for number in range(11):
        shutil.copytree(root / "red", root / str(number))
    shutil.rmtree(root / "red")
    listing = read_listing(root)
    assert listing.classes == tuple(str(number) for number in range(11))
    assert [file.label for file in listing.splits[""].files] == list(range(11))


def test_folders_that_do_not_agree(tmp_path):
    root = write_domains(tmp_path / "a")
    shutil.rmtree(root / "sketch" / "red")
    with pytest.raises(VlkrError, match=r"looks like <domain>/<class>/<image>, but 'red' is not"):
        read_listing(root)
    root = write_images(tmp_path / "b", per_class=1, splits=("train", "test"))
    (root / "test" / "extra").mkdir()
    (root / "test" / "extra" / "0.png").write_bytes(b"x")
    with pytest.raises(VlkrError, match="class 'extra' is not in every split of"):
        read_listing(root)
    root = write_domains(tmp_path / "c", splits=("train", "test"), domains=("a", "b", "c"))
    shutil.rmtree(root / "test" / "b")
    with pytest.raises(VlkrError, match="domain 'b' is not in every split of"):
        read_listing(root)


def test_folders_without_classes_or_images(tmp_path):
    with pytest.raises(VlkrError, match=r"no class folders in .*, expected .*/<class>/<image>"):
        read_listing(tmp_path)
    root = write_images(tmp_path / "d", per_class=1)
    (root / "blue" / "0.png").unlink()
    with pytest.raises(VlkrError, match=r"class 'blue' is empty: no image in .*blue"):
        read_listing(root)


def test_a_name_that_is_not_utf8(tmp_path):
    root = write_images(tmp_path / "d", per_class=1)
    (root / "red" / "caf\udce9.png").write_bytes(b"x")
    with pytest.raises(VlkrError, match=r"the file name 'caf\\udce9\.png' in .*red is not UTF-8"):
        read_listing(root)
    (root / "red" / "caf\udce9.png").rename(root / "red" / "café.png")
    assert "red/café.png" in [file.path for file in read_listing(root).splits[""].files]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    root = write_images(tmp_path / "d", per_class=1)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(VlkrError, match=r"cannot read .*/d: Permission denied"):
        read_listing(root)


# Tables

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


both = pytest.mark.parametrize("write", [write_csv, write_jsonl])


@both
def test_paths_labels_domains_and_splits(tmp_path, write):
    listing = read_listing(write(tmp_path, ROWS))
    assert listing.classes == ("cat", "dog")
    assert (listing.domains, listing.named_by) == (("art", "photo"), "names")
    assert list(listing.splits) == ["train", "test"]
    assert all(source.root == tmp_path for source in listing.splits.values())
    train, test = map(entries, listing.splits.values())
    assert train == [("photo/1.jpg", 1, "photo"), ("art/1.jpg", 0, "art")]
    assert test == [("photo/2.jpg", 0, "photo")]


@both
def test_domain_and_split_may_be_absent(tmp_path, write):
    rows = [{"path": row["path"], "label": row["label"]} for row in ROWS]
    listing = read_listing(write(tmp_path, rows))
    assert listing.domains == ()
    expected = [("photo/1.jpg", 1, None), ("photo/2.jpg", 0, None), ("art/1.jpg", 0, None)]
    assert entries(listing.splits[""]) == expected


@both
def test_numbers_are_labels(tmp_path, write):
    rows = [{"path": f"{i}.png", "label": 11 - i} for i in range(12)]
    listing = read_listing(write(tmp_path, rows))
    assert listing.classes == tuple(str(i) for i in range(12))
    assert listing.named_by == "numbers"
    assert [file.label for file in listing.splits[""].files] == list(range(11, -1, -1))


def test_csv_with_quotes_and_a_byte_order_mark(tmp_path):
    text = '\ufefflabel,note,path\n"big, red",x,"a ""b"".png"\nblue,,c.png\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    listing = read_listing(tmp_path / "t.csv")
    assert listing.classes == ("big, red", "blue")
    assert entries(listing.splits[""]) == [('a "b".png', 0, None), ("c.png", 1, None)]


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
        ([row | {"label": i + 1} for i, row in enumerate(ROWS)], "label 3, .* must be 0 to 2"),
        ([row | {"label": 2 * i} for i, row in enumerate(ROWS)], "label 4, .* must be 0 to 2"),
    ],
)
@both
def test_bad_lines_are_told(tmp_path, write, rows, message):
    with pytest.raises(VlkrError, match=r"t\.\w+.*" + message):
        read_listing(write(tmp_path, rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", None, r"cannot read .*t\.csv: No such file"),
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
        ("t.jsonl", b'{"path": ["a"], "label": 1}', r"has path \['a'\], expected a string"),
        ("t.jsonl", b"[" * 100_000, "cannot read .*t.jsonl: .*recursion|holds"),
        ("t.json", b"[]", "t.json holds a list, expected a mapping"),
        ("t.json", b"{}", "t.json lists no image"),
        ("t.json", b'{"all": []}', "has split 'all', expected train, val, test"),
        ("t.json", b'{"train": []}', "split 'train' is not a list of images"),
        ("t.json", b'{"train": {"a": 1}}', "split 'train' is not a list of images"),
        ("t.json", b'{"train": [["a", 0]]}', r"train image 0 is \['a', 0\], expected \[path, lab"),
        ("t.json", b'{"train": [["a", "0", "x"]]}', r"expected \[path, label, class name\]"),
        ("t.json", b'{"train": [["a", true, "x"]]}', r"expected \[path, label, class name\]"),
        ("t.json", b'{"train": [["/a", 0, "x"]]}', "train image 0 has path '/a', expected one"),
    ],
)
def test_files_that_are_not_lists(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VlkrError, match=message):
        read_listing(tmp_path / name)


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
    for split, listed in COOP.items():
        samples = list(dataset.source(split))
        assert [(s.key, s.label) for s in samples] == [(path, label) for path, label, _ in listed]
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
        read_listing(write_coop(tmp_path / "d", content))


def test_split_file_without_its_images(tmp_path):
    with pytest.raises(VlkrError, match=r"no image 'red/0\.png' beside .*split_zhou_Colors\.json"):
        read_listing(write_coop(tmp_path / "d"))


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
