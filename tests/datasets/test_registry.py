import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml
from helpers import COLORS, ROOT, color_image, write_images, write_shards

from vlkr.datasets import BadSample, DataConfig, load_dataset
from vlkr.datasets.cards import load_card
from vlkr.datasets.splits import few_shot_split
from vlkr.errors import VlkrError


def test_card_by_name():
    card = yaml.safe_load((ROOT / "data" / "digits.yaml").read_text())
    digits = load_dataset("digits")
    assert digits.class_names == tuple(card["class_names"])
    assert digits.templates == tuple(card["templates"])
    assert digits.shifts == tuple(card["shifts"])
    assert digits.sizes == card["splits"]
    assert {split: sum(1 for _ in digits.source(split)) for split in digits.splits} == digits.sizes


def test_folder_without_a_card(tmp_path):
    dataset = load_dataset(write_images(tmp_path / "my_colors", per_class=2))
    assert (dataset.name, dataset.class_names) == ("my_colors", ("blue", "green", "red"))
    assert (dataset.templates, dataset.template_set) == (("a photo of a {c}.",), "default (1)")


def test_class_names_are_read_with_spaces(tmp_path):
    root = write_images(tmp_path / "d", per_class=2)
    (root / "red").rename(root / "dark_red")
    (root / ".hidden").mkdir()
    (root / "readme.txt").touch()
    assert load_dataset(root).class_names == ("blue", "dark red", "green")


def test_folder_of_shards(tmp_path):
    root = write_shards(tmp_path / "d")
    dataset = load_dataset(root)
    assert dataset.class_names == tuple(COLORS)
    assert dataset.templates == ("a photo of a {c}.",)
    assert {s.label for s in dataset.source("test")} == {0, 1, 2}
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\n\nthe {c}\n")
    (root / "classnames.txt").write_text("near\n\nfar\n\n")
    dataset = load_dataset(root)
    assert dataset.templates == ("a {c}", "the {c}")
    assert dataset.class_names == ("near", "", "far")  # an empty name keeps its place


def test_few_shot_split_does_not_depend_on_the_shard_layout(tmp_path):
    chosen = []
    for shards in (1, 2, 7):
        source = load_dataset(write_shards(tmp_path / str(shards), shards=shards)).source("train")
        split = few_shot_split(source, tuple(COLORS), 3, seed=5)
        chosen.append(([s.key for s in split.train], [s.key for s in split.val]))
    assert chosen[0] == chosen[1] == chosen[2]


def test_given_templates_replace_the_cards():
    dataset = load_dataset("digits", templates=("x {c}",))
    assert (dataset.templates, dataset.template_set) == (("x {c}",), "given (1)")
    with pytest.raises(VlkrError, match="empty"):
        load_dataset("digits", templates=())


def test_unknown_names_get_the_nearest():
    with pytest.raises(VlkrError, match=r"no dataset 'digts'.*did you mean digits"):
        load_dataset("digts")
    with pytest.raises(
        VlkrError, match="neither a path nor a card; vlkr data list shows the cards"
    ):
        load_dataset("my/photos")


def test_unknown_split():
    with pytest.raises(VlkrError, match="'digits' has no split 'val'; it has train, test"):
        load_dataset("digits").source("val")


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, float("nan")])
def test_test_fraction_out_of_range(fraction):
    with pytest.raises(VlkrError, match=r"test fraction .* is out of range"):
        load_dataset("digits", test_fraction=fraction)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_unreadable_class_names(tmp_path, content):
    root = write_shards(tmp_path / "d")
    (root / "classnames.txt").write_bytes(content)
    with pytest.raises(VlkrError, match=r"classnames\.txt"):
        load_dataset(root)


def test_too_few_classes_or_splits(tmp_path):
    with pytest.raises(VlkrError, match="'a' has one class only"):
        load_dataset(write_images(tmp_path / "a", names=["red"]))
    with pytest.raises(VlkrError, match="no split in"):
        load_dataset(write_shards(tmp_path / "b", splits=("validation",)))


def test_a_folder_named_as_a_card_is_the_folder_when_given_as_root(tmp_path, monkeypatch):
    write_images(tmp_path / "digits", per_class=4)
    monkeypatch.chdir(tmp_path)
    assert DataConfig(root=Path("digits")).load().class_names == ("blue", "green", "red")
    assert len(DataConfig(name="digits").load().class_names) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no dataset: give --data.name CARD or --data.root FOLDER"),
        ({"root": ROOT / "nothing"}, "no folder at data root"),
        (
            {"root": ROOT / "README.md"},
            r"README\.md is not a folder or a list of images \(\.json, ",
        ),
        (
            {"name": "https://host/x", "root": ROOT},
            "data.name https://host/x is not a card, as it must be",
        ),
        ({"name": str(ROOT)}, "is a folder; give it as --data.root"),
        ({"name": "digits", "shots": 0}, "data.shots is 0: it should be greater"),
        ({"name": "digits", "batch_size": 0}, "data.batch_size is 0: it should be greater"),
        ({"name": "digits", "min_steps_per_epoch": 0}, "min_steps_per_epoch is 0: it should be"),
        ({"name": "digits", "num_workers": -1}, "data.num_workers is -1: it should be greater"),
        ({"name": "digits", "templates": []}, "list of templates is empty"),
        ({"name": "digits", "crop_scale": (0.0, 1.0)}, "crop_scale 0.0, 1.0 is out of range"),
        ({"name": "digits", "crop_scale": (0.9, 0.5)}, "crop_scale 0.9, 0.5 is out of range"),
        ({"name": "digits", "crop_scale": (0.5, float("nan"))}, "crop_scale .* is out of range"),
        ({"name": "digits", "test_fraction": 1.0}, "test fraction 1.0 is out of range"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(VlkrError, match=message):
        DataConfig(**options).load()


EUROSAT = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture"),
    *("PermanentCrop", "Residential", "River", "SeaLake"),
)


def write_classes(root, names, per_class=2):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i}.png").write_bytes(color_image("red", i))
    return root


def labels(source):
    return {s.key.split("/")[0]: s.label for s in source}


def test_card_over_a_folder(tmp_path):
    root = write_classes(tmp_path / "2750", EUROSAT, per_class=8)
    dataset = load_dataset(f"eurosat={root}")
    assert (dataset.name, dataset.template_set) == ("eurosat", "coop (1)")
    assert dataset.class_names[0] == "annual crop land"
    assert dataset.class_names[-1] == "lake or sea"
    assert labels(dataset.source("train")) == {name: i for i, name in enumerate(EUROSAT)}
    plain = load_dataset(root)
    assert plain.class_names[0] == "AnnualCrop"
    for split in plain.splits:
        assert list(plain.source(split)) == list(dataset.source(split))


def test_folders_are_found_whatever_their_case_and_order(tmp_path):
    names = ("Dog", "elephant", "GIRAFFE", "guitar", "horse", "house", "person")
    root = write_classes(tmp_path / "d" / "sketch", names)
    write_classes(tmp_path / "d" / "photo", names)
    dataset = load_dataset(f"pacs={root.parent}")
    assert dataset.class_names == tuple(name.lower() for name in names)
    assert dataset.domains == ("photo", "sketch")
    for sample in [*dataset.source("train"), *dataset.source("test")]:
        assert dataset.class_names[sample.label] == sample.key.split("/")[1].lower()


def test_class_folders_of_imagenet(tmp_path):
    synsets = load_card("imagenet-a").class_folders()
    dataset = load_dataset(f"imagenet-a={write_classes(tmp_path / 'a', synsets, 1)}")
    assert list(dataset.splits) == ["test"]  # the card knows no other split
    found = labels(dataset.source("test"))
    assert found == {synset: label for label, synset in enumerate(synsets)}
    assert dataset.class_names[found["n01498041"]] == "stingray"


def test_the_test_split_of_imagenet_is_called_val(tmp_path):
    synsets = load_card("imagenet").class_folders()
    for split in ("train", "val"):
        write_classes(tmp_path / "i" / split, synsets, 1)
    dataset = load_dataset(f"imagenet={tmp_path / 'i'}")
    assert list(dataset.splits) == ["train", "test"]
    assert len(dataset.source("test").files) == 1000
    assert list(load_dataset(tmp_path / "i").splits) == ["train", "val"]


def test_numbered_folders_are_the_cards_labels(tmp_path):
    root = write_classes(tmp_path / "d", [str(i) for i in range(10)], 1)
    dataset = load_dataset(f"cifar10={root}")
    assert dataset.class_names[2] == "bird"
    samples = [s for split in dataset.splits for s in dataset.source(split)]
    assert {s.key.split("/")[0]: s.label for s in samples} == {str(i): i for i in range(10)}


def test_a_split_file_brings_its_own_names(tmp_path):
    write_images(tmp_path / "pets" / "images", per_class=2)
    content = {
        split: [[f"{name}/{i}.png", label, name] for label, name in enumerate(COLORS)]
        for i, split in enumerate(("train", "test"))
    }
    path = tmp_path / "pets" / "split_zhou_OxfordPets.json"
    path.write_text(json.dumps(content))
    for place in (path, path.parent):  # CoOp's folder will do
        dataset = load_dataset(f"oxford-pets={place}")
        assert dataset.name == "oxford-pets"
        assert dataset.class_names == tuple(COLORS)
        assert dataset.templates == ("a photo of a {c}, a type of pet.",)
    assert load_dataset(path.parent).class_names == tuple(COLORS)


def test_numbers_in_a_table_are_the_cards_labels(tmp_path):
    write_images(tmp_path, per_class=4)
    rows = [f"{name}/{i}.png,{label}" for label, name in enumerate(COLORS) for i in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(VlkrError, match=r"t\.csv has 3 numbered classes, card 'eurosat' 10"):
        load_dataset(f"eurosat={tmp_path / 't.csv'}")
    assert load_dataset(tmp_path / "t.csv").class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (EUROSAT[1:], "lacks class 'AnnualCrop' of card 'eurosat'"),
        (
            (*EUROSAT[1:], "AnualCrop"),
            "class 'AnualCrop' of .* is not on card 'eurosat'; did you mean 'AnnualCrop'",
        ),
        ((*EUROSAT, "other"), "class 'other' of .* is not on card 'eurosat'$"),
        ((*EUROSAT, "annual_crop"), "has two folders for a class of card 'eurosat'"),
    ],
)
def test_folders_that_are_not_the_cards(tmp_path, names, message):
    with pytest.raises(VlkrError, match=message):
        load_dataset(f"eurosat={write_classes(tmp_path / 'd', names)}")


def test_numbers_before_class_names_are_left_out(tmp_path):
    root = write_classes(tmp_path / "d", ["001.Black_footed_Albatross", "002.Laysan_Albatross"])
    assert load_dataset(f"cub200={root}").class_names == (
        "Black footed Albatross",
        "Laysan Albatross",
    )


def test_only_some_domains(tmp_path):
    for domain in ("photo", "sketch", "art"):
        write_images(tmp_path / "d" / domain, per_class=3)
    dataset = load_dataset(tmp_path / "d")
    assert dataset.domains == ("art", "photo", "sketch")
    some = dataset.select(domains=["sketch", "art"])
    assert some.domains == ("art", "sketch")
    for split in dataset.splits:
        expected = [s for s in dataset.source(split) if s.domain != "photo"]
        assert list(some.source(split)) == expected
    with pytest.raises(VlkrError, match="has no domain 'cartoon'; it has art, photo, sketch"):
        dataset.select(domains=["cartoon"])
    with pytest.raises(VlkrError, match="no domain of dataset 'd' given"):
        dataset.select(domains=[])
    with pytest.raises(VlkrError, match="'digits' has no domain 'art'; it has none"):
        load_dataset("digits").select(domains=["art"])


def test_domains_of_shards(tmp_path):
    folder = write_shards(tmp_path / "d", splits=())
    (folder / "test").mkdir()
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for i, domain in enumerate(("a", "b", "a")):
            fields = {"png": b"x", "cls": b"1", "json": json.dumps({"domain": domain}).encode()}
            for extension, content in fields.items():
                entry = tarfile.TarInfo(f"{i}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    (folder / "domains.txt").write_text("a\nb\n")
    dataset = load_dataset(folder)
    assert dataset.domains == ("a", "b")
    assert [s.key for s in dataset.select(domains=["a"]).source("test")] == ["0", "2"]
    (folder / "domains.txt").write_text("a\nc\n")
    bad = [str(s) for s in load_dataset(folder).source("test") if isinstance(s, BadSample)]
    assert bad == [f"{folder / 'test' / '0.tar'}, sample '1' has domain 'b', expected one of a, c"]
