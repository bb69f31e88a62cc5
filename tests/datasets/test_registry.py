from pathlib import Path

import pytest
import yaml
from helpers import COLORS, ROOT, write_images, write_shards

from vlkr.datasets import DataOptions, load_dataset
from vlkr.datasets.few_shot import few_shot_split
from vlkr.errors import VlkrError


def test_card_by_name():
    card = yaml.safe_load((ROOT / "data" / "digits.yaml").read_text())
    digits = load_dataset("digits")
    assert digits.class_names == tuple(card["class_names"])
    assert digits.templates == tuple(card["templates"])
    assert digits.shifts == tuple(card["shifts"])
    assert digits.sizes == card["splits"]
    assert {split: sum(1 for _ in digits.source(split)) for split in digits.splits} == digits.sizes


def test_folder_without_splits(tmp_path):
    dataset = load_dataset(write_images(tmp_path / "my_colors", per_class=20))
    assert dataset.name == "my_colors"
    assert dataset.class_names == ("blue", "green", "red")
    assert dataset.templates == ("a photo of a {c}.",)
    train, test = ({s.key for s in dataset.source(split)} for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 60


def test_class_names_are_read_with_spaces(tmp_path):
    root = write_images(tmp_path / "d", per_class=2)
    (root / "red").rename(root / "dark_red")
    (root / ".hidden").mkdir()
    (root / "readme.txt").touch()
    assert load_dataset(root).class_names == ("blue", "dark red", "green")


def test_folder_with_splits(tmp_path):
    root = write_images(tmp_path / "d", per_class=3, splits=("train", "val", "test"))
    dataset = load_dataset(root)
    assert list(dataset.splits) == ["train", "val", "test"]
    for split in dataset.splits:
        assert [s.key for s in dataset.source(split)] == [
            f"{name}/{i}.png" for name in sorted(COLORS) for i in range(3)
        ]
    images = {s.image for split in dataset.splits for s in dataset.source(split)}
    assert len(images) == 27


def test_folder_of_shards(tmp_path):
    root = write_shards(tmp_path / "d")
    dataset = load_dataset(root)
    assert dataset.class_names == tuple(COLORS)
    assert dataset.templates == ("a photo of a {c}.",)
    assert {s.label for s in dataset.source("test")} == {0, 1, 2}
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\n\nthe {c}\n")
    assert load_dataset(root).templates == ("a {c}", "the {c}")


def test_few_shot_split_does_not_depend_on_the_shard_layout(tmp_path):
    chosen = []
    for shards in (1, 2, 7):
        source = load_dataset(write_shards(tmp_path / str(shards), shards=shards)).source("train")
        split = few_shot_split(source, tuple(COLORS), 3, seed=5)
        chosen.append(([s.key for s in split.train], [s.key for s in split.val]))
    assert chosen[0] == chosen[1] == chosen[2]


def test_given_templates_replace_the_cards():
    dataset = load_dataset("digits", templates=("x {c}",))
    assert dataset.templates == ("x {c}",)
    assert dataset.template_set == "given (1)"


@pytest.mark.parametrize(
    ("templates", "message"), [((), "empty"), (("a photo",), "'a photo' lacks the placeholder")]
)
def test_templates_that_cannot_be(templates, message):
    with pytest.raises(VlkrError, match=message):
        load_dataset("digits", templates=templates)


def test_unknown_names_get_the_nearest():
    with pytest.raises(VlkrError, match=r"no dataset 'digts'.*did you mean digits"):
        load_dataset("digts")
    with pytest.raises(VlkrError, match="cards: digits, digits-blur"):
        load_dataset("imagenet")


def test_unknown_split():
    with pytest.raises(VlkrError, match="'digits' has no split 'val'; it has train, test"):
        load_dataset("digits").source("val")


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, float("nan")])
def test_test_fraction_out_of_range(fraction):
    with pytest.raises(VlkrError, match=r"test fraction .* is out of range"):
        load_dataset("digits", test_fraction=fraction)


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(VlkrError, match="no class folders in"):
        load_dataset(tmp_path)
    root = write_images(tmp_path / "empty", per_class=1)
    (root / "red" / "0.png").unlink()
    with pytest.raises(VlkrError, match="class 'red' is empty"):
        load_dataset(root)
    root = write_images(tmp_path / "odd", per_class=1, splits=("train", "test"))
    (root / "test" / "extra").mkdir()
    with pytest.raises(VlkrError, match="class 'extra' is not in every split"):
        load_dataset(root)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_unreadable_class_names(tmp_path, content):
    root = write_shards(tmp_path / "d")
    (root / "classnames.txt").write_bytes(content)
    with pytest.raises(VlkrError, match=r"classnames\.txt"):
        load_dataset(root)


def test_a_single_class_is_no_classification(tmp_path):
    with pytest.raises(VlkrError, match="'d' has one class only"):
        load_dataset(write_images(tmp_path / "d", names=["red"]))


def test_shards_without_a_split(tmp_path):
    with pytest.raises(VlkrError, match="no split in"):
        load_dataset(write_shards(tmp_path / "d", splits=("validation",)))


def test_a_folder_named_as_a_card_is_the_folder_when_given_as_root(tmp_path, monkeypatch):
    write_images(tmp_path / "digits", per_class=4)
    monkeypatch.chdir(tmp_path)
    assert DataOptions(root=Path("digits")).load().class_names == ("blue", "green", "red")
    assert len(DataOptions(name="digits").load().class_names) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no dataset: give --data.name CARD or --data.root FOLDER"),
        ({"name": "digits", "root": ROOT}, "two datasets"),
        ({"root": ROOT / "nothing"}, "no folder at data root"),
        ({"root": ROOT / "README.md"}, "no folder at data root"),
        ({"name": str(ROOT)}, "is a folder; give it as --data.root"),
        ({"name": "digits", "shots": 0}, "data.shots 0 is too small"),
        ({"name": "digits", "batch_size": 0}, "data.batch_size 0 is too small"),
        ({"name": "digits", "min_steps_per_epoch": 0}, "min_steps_per_epoch 0 is too small"),
        ({"name": "digits", "num_workers": -1}, "data.num_workers -1 is too small"),
        ({"name": "digits", "templates": []}, "list of templates is empty"),
        ({"name": "digits", "crop_scale": (0.0, 1.0)}, "crop_scale 0.0, 1.0 is out of range"),
        ({"name": "digits", "crop_scale": (0.9, 0.5)}, "crop_scale 0.9, 0.5 is out of range"),
        ({"name": "digits", "crop_scale": (0.5, float("nan"))}, "crop_scale .* is out of range"),
        ({"name": "digits", "test_fraction": 1.0}, "test fraction 1.0 is out of range"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(VlkrError, match=message):
        DataOptions(**options).load()
