import json
import pickle

import pytest
from helpers import color_image, write_images

from vlkr.datasets import FewShotSplit, Sample, few_shot_split, load_dataset
from vlkr.datasets.samples import BadSample
from vlkr.datasets.split_files import read_split, take_split, write_split
from vlkr.errors import VlkrError

NAMES = ("red", "green", "blue")
SAMPLES = [
    Sample(f"{NAMES[label]}/{i}.jpg", b"image", label, "d" if i % 2 else None)
    for label in range(3)
    for i in range(6)
]


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_split_comes_back_as_it_was(tmp_path):
    split = few_shot_split(SAMPLES, NAMES, 2, seed=1)
    path = tmp_path / "split.jsonl"
    write_split(path, split, NAMES, {"dataset": "d", "seed": 1, "shots": 2})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    header = {"format": "vlkr split 1", "dataset": "d", "seed": 1, "shots": 2}
    assert lines[0] == {**header, "class_names": list(NAMES)}
    assert [line["key"] for line in lines[1:]] == [s.key for s in split.train + split.val]
    assert {line["part"] for line in lines[1:]} == {"train", "val"}
    assert [line.get("domain") for line in lines[1:]] == [s.domain for s in split.train + split.val]
    assert take_split(reversed(SAMPLES), read_split(path), NAMES) == split


def test_repeated_samples_stay_repeated(tmp_path):
    split = FewShotSplit([SAMPLES[0], SAMPLES[0], SAMPLES[6]], [])
    path = tmp_path / "split.jsonl"
    write_split(path, split, NAMES, {})
    assert take_split(SAMPLES, read_split(path), NAMES) == split


def test_images_beyond_the_bound_are_let_go(tmp_path):
    split = few_shot_split(SAMPLES, NAMES, 2, seed=1)
    write_split(tmp_path / "s.jsonl", split, NAMES, {})
    file = read_split(tmp_path / "s.jsonl")
    bare = take_split(SAMPLES, file, NAMES, max_bytes=20)
    assert [s.key for s in bare.train] == [s.key for s in split.train]
    assert not any(s.image for s in bare.train + bare.val)
    order = [s.key for s in SAMPLES]
    assert bare.positions == {s.key: order.index(s.key) for s in split.train + split.val}


COOP = {
    "train": [["red/0.jpg", 0, "red"], ["blue/2.jpg", 2, "blue"]],
    "val": [["green/1.jpg", 1, "green"]],
    "test": [["green/3.jpg", 1, "green"]],
}


def test_coops_split_is_read(tmp_path):
    file = read_split(write(tmp_path / "split_zhou_Colors.json", COOP))
    split = take_split(SAMPLES, file, NAMES)
    assert [s.key for s in split.train] == ["red/0.jpg", "blue/2.jpg"]
    assert [s.key for s in split.val] == ["green/1.jpg"]


@pytest.mark.parametrize("prefix", [("images/", ""), ("", "images/")])
def test_the_end_of_a_path_is_enough(tmp_path, prefix):
    theirs, ours = prefix
    value = {"train": [{"impath": f"{theirs}{p}", "label": n} for p, n, _ in COOP["train"]]}
    samples = [Sample(ours + s.key, s.image, s.label) for s in SAMPLES]
    split = take_split(samples, read_split(write(tmp_path / "few.json", value)), NAMES)
    assert [s.key for s in split.train] == [f"{ours}red/0.jpg", f"{ours}blue/2.jpg"]
    assert split.val == []


def test_other_numbers_of_the_classes_are_taken_if_they_fit(tmp_path):
    train = [["red/0.jpg", 7, "red"], ["red/1.jpg", 7, "red"], ["blue/2.jpg", 0, "blue"]]
    file = read_split(write(tmp_path / "few.json", {"train": train}))
    assert [s.label for s in take_split(SAMPLES, file, NAMES).train] == [0, 0, 2]
    for label in (0, 8):
        train[1][1] = label
        file = read_split(write(tmp_path / "few.json", {"train": train}))
        with pytest.raises(VlkrError, match=r"has label \d in split file .*few.json, but the data"):
            take_split(SAMPLES, file, NAMES)


@pytest.mark.parametrize("name", ["shot_16-seed_1.pkl", "split.jsonl"])
def test_pickles_are_refused_unread(tmp_path, name):
    path = tmp_path / name

    class Evil:
        def __reduce__(self):
            return (path.with_suffix(".run").touch, ())

    path.write_bytes(pickle.dumps({"train": [Evil()]}))
    with pytest.raises(VlkrError, match=r"is a pickle.*give CoOp's split_zhou_\*\.json or"):
        read_split(path)
    assert not path.with_suffix(".run").exists()


def line(key, label, part="train"):
    return json.dumps({"key": key, "label": label, "part": part}) + "\n"


HEADER = '{"format": "vlkr split 1", "class_names": ["red", "green", "blue"]}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.jsonl", "", "line 1 is not a line of a split file"),
        ("s.jsonl", '{"format": "other"}\n', "line 1 .*format 'other', expected 'vlkr split 1'"),
        ("s.jsonl", HEADER + '{"key": "a"}\n', "line 2 is not a line of a split file: KeyError"),
        ("s.jsonl", HEADER + "no JSON\n", "line 2 is not a line of a split file"),
        ("s.jsonl", HEADER + line("a", float("inf")), "line 2 .*: OverflowError"),
        ("s.jsonl", HEADER + "[" * 100_000, "line 2 .*: RecursionError"),
        ("s.jsonl", "[" * 100_000, "line 1 .*: RecursionError"),
        ("s.json", '{"train": [["a", Infinity, "x"]]}', r"\['a', inf, 'x'\] in 'train' is not a"),
        ("s.json", '{"train": [["a", 0, "x"]], "val": 3}', "has no list 'train' or 'val'"),
        ("s.json", "[]", "holds a list, expected a mapping"),
        ("s.json", '{"test": []}', "has no list 'train' or 'val', expected CoOp's form"),
        (
            "s.json",
            '{"train": [["a"]]}',
            r"\['a'\] in 'train' is not a sample, expected \[p",
        ),
    ],
)
def test_files_that_are_no_split(tmp_path, name, content, message):
    with pytest.raises(VlkrError, match=message):
        read_split(write(tmp_path / name, content))


def test_missing_file(tmp_path):
    with pytest.raises(VlkrError, match=r"cannot read .*none\.jsonl: No such file"):
        read_split(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line("red/0.jpg", 1), "'red/0.jpg' has label 1 in split file .* the dataset's label 0"),
        (line("red/0.jpg", 0) + line("x", 0), "1 of 2 keys of .* are not in .*, such as 'x'"),
        (line("red/0.jpg", 0, "val"), "has no sample to train on"),
        (
            line("red/0.jpg", 0) + line("red/0.jpg", 0, "val"),
            "trains on and validates with 'red/0.jpg'",
        ),
        (line("red/0.jpg", 0) + line("red/0.jpg", 1), "has two labels for 'red/0.jpg'"),
    ],
)
def test_splits_that_do_not_go_with_the_data(tmp_path, content, message):
    file = read_split(write(tmp_path / "s.jsonl", HEADER + content))
    with pytest.raises(VlkrError, match=message):
        take_split(SAMPLES, file, NAMES)


def test_other_classes_are_told(tmp_path):
    file = read_split(write(tmp_path / "s.jsonl", HEADER + line("red/0.jpg", 0)))
    with pytest.raises(
        VlkrError, match=r"is of 3 classes, red, green, blue, \.\.\.; the dataset has"
    ):
        take_split(SAMPLES, file, ("green", "red", "blue"))


def test_a_path_that_fits_two_samples_is_told(tmp_path):
    samples = [Sample("a/0.jpg", b"", 0), Sample("b/a/0.jpg", b"", 0)]
    file = read_split(write(tmp_path / "s.json", {"train": [["0.jpg", 0, "x"]]}))
    with pytest.raises(VlkrError, match=r"'0\.jpg' of split file .* fits two samples, 'a/0\.jpg'"):
        take_split(samples, file, ("x", "y"))
    file = read_split(write(tmp_path / "s.json", {"train": [["a/0.jpg", 0, ""], ["0.jpg", 0, ""]]}))
    with pytest.raises(VlkrError, match=r"sample 'b/a/0\.jpg' fits several of .*: 0\.jpg, a/0"):
        take_split(samples[1:], file, ("x", "y"))


def test_halves_of_the_classes(tmp_path):
    dataset = load_dataset(write_images(tmp_path / "d", per_class=6))
    names = dataset.class_names
    base = dataset.select(classes="base")
    assert base.class_names == names[:2]
    whole = list(dataset.source("test"))
    assert list(base.source("test")) == [s for s in whole if s.label < 2]
    assert [s for shard in base.source("test").shards() for s in shard] == list(base.source("test"))
    with pytest.raises(VlkrError, match="the new half of 'd' has 1 of 3 classes, expected two"):
        dataset.select(classes="new")


def test_the_new_half_is_renumbered(tmp_path):
    for c, name in enumerate("abcde"):
        folder = tmp_path / "d" / name
        folder.mkdir(parents=True)
        for i in range(8):
            (folder / f"{i}.png").write_bytes(color_image("red", 100 * c + i))
    dataset = load_dataset(tmp_path / "d")
    new = dataset.select(classes="new")
    assert new.class_names == ("d", "e")
    expected = [(s.key, s.label - 3) for s in dataset.source("train") if s.label > 2]
    assert [(s.key, s.label) for s in new.source("train")] == expected


def test_a_bad_sample_does_not_end_a_half(tmp_path):
    dataset = load_dataset(write_images(tmp_path / "d", per_class=6, splits=("train", "test")))
    (tmp_path / "d" / "train" / "blue" / "1.png").unlink()
    found = list(dataset.select(classes="base").source("train"))
    assert [s.key for s in found] == [f"{c}/{i}.png" for c in ("blue", "green") for i in range(6)]
    assert [isinstance(s, BadSample) for s in found] == [s.key == "blue/1.png" for s in found]
