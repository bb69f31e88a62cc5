import datetime
import re

import pytest
import yaml
from helpers import ROOT, color_image, write_tar

from vlkr.datasets import DataConfig, cards, load_dataset
from vlkr.datasets.cards import FROM_DATA, SUITES, card_names, load_card
from vlkr.datasets.prompts import check_templates, resolve_list
from vlkr.errors import VlkrError

CARDS = {name: load_card(name) for name in card_names()}
FOREIGN = [name for name, card in CARDS.items() if card.shards is None]
# Number of classes as the papers and benchmarks tell.
CLASSES = {
    **dict.fromkeys(["imagenet", "imagenet-v2", "imagenet-sketch"], 1000),
    **dict.fromkeys(["imagenet-a", "imagenet-r"], 200),
    **{"caltech101": 102, "oxford-pets": 37, "stanford-cars": 196, "flowers102": 102},
    **{"food101": 101, "sun397": 397, "dtd": 47, "eurosat": 10, "ucf101": 101, "pacs": 7},
    **{"vlcs": 5, "office-home": 65, "terra-incognita": 10, "domain-net": 345, "gtsrb": 43},
    **{"mnist": 10, "resisc45": 45, "svhn": 10, "cifar10": 10, "cifar100": 100, "stl10": 10},
    **{"voc2007": 20, "country211": 211, "patch-camelyon": 2, "diabetic-retinopathy": 5},
    **{"clevr-count": 8, "dmlab": 6, "kitti-distance": 4},
}
UNNAMED = {
    *("fgvc-aircraft", "caltech256", "cub200", "objectnet", "clevr-distance"),
    *("dsprites-location", "dsprites-orientation", "smallnorb-azimuth", "smallnorb-elevation"),
}


def write_data(folder, num_classes):
    """Shards of a test split with an image a class, and nothing beside them."""
    (folder / "test").mkdir(parents=True)
    image = color_image("red", 0)
    samples = [(str(label), image, label) for label in range(num_classes)]
    write_tar(folder / "test" / "0.tar", samples)
    return folder


def test_suites_are_whole():
    sizes = {suite: sum(suite in card.suites for card in CARDS.values()) for suite in SUITES}
    assert sizes == {"coop": 11, "kradapter": 22, "imagenet-shift": 5, "domainbed": 5, "vtab": 19}
    assert {name for name in FOREIGN if CARDS[name].class_names == FROM_DATA} == UNNAMED
    assert set(CLASSES) | UNNAMED == set(FOREIGN)


def test_cards_are_whole():
    for name, card in CARDS.items():
        assert all((card.title, card.source, card.licence))
        assert set(card.suites) <= set(SUITES)
        assert set(card.splits) <= {"train", "val", "test"}
        assert all(number > 0 for number in card.splits.values())
        assert card.wds is None or re.fullmatch(r"wds/[\w/-]+", card.wds)
        assert ("domainbed" in card.suites) == bool(card.domains)
        names, folders = card.named_classes(), card.class_folders()
        assert names is None or (all(names) and len(names) == len(folders or names))
        assert len(set(folders)) == len(folders)
        assert name not in CLASSES or len(names) == CLASSES[name]


def test_shifts_refer_to_each_other():
    for name, card in CARDS.items():
        assert all(CARDS[shift].shift_of == name for shift in card.shifts)
        assert card.shift_of is None or name in CARDS[card.shift_of].shifts


def test_templates_of_the_cards():
    for name, card in CARDS.items():
        for templates in card.templates.values():
            prompts = resolve_list(templates)
            check_templates(prompts)
            assert len(set(prompts)) == len(prompts)
        assert ("coop" in card.templates) == ("coop" in card.suites or name.startswith("imagenet-"))
        assert ("kradapter" in card.templates) == ("kradapter" in card.suites)


def test_cards_with_their_data(tmp_path):
    for name in FOREIGN:
        number = CLASSES.get(name, 3)
        root = write_data(tmp_path / name, number)
        if name in UNNAMED:
            (root / "classnames.txt").write_text("one\ntwo\nthree\n")
        dataset = load_dataset(f"{name}={root}")
        expected = CARDS[name].named_classes() or ("one", "two", "three")
        assert (dataset.name, dataset.class_names) == (name, expected)
        default, templates = next(iter(CARDS[name].templates.items()))
        assert dataset.templates == resolve_list(templates)
        assert dataset.template_set == f"{default} ({len(dataset.templates)})"
        assert len(list(dataset.source("test"))) == number
        assert DataConfig(name=name, root=root).load() == dataset


def test_cards_without_their_data(monkeypatch):
    monkeypatch.delenv("VLKR_DATA", raising=False)
    for name in FOREIGN:
        with pytest.raises(VlkrError) as error:
            load_dataset(name)
        message = str(error.value)
        start = f"{name} is known ({CARDS[name].title}) but its data is not here: "
        assert message.startswith(start)
        assert f"{name}=DIR" in message
        assert f"$VLKR_DATA/{name}" in message
        assert (f"or {name}={CARDS[name].wds} to stream it" in message) == bool(CARDS[name].wds)


def test_data_below_the_environments_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLKR_DATA", str(tmp_path))
    write_data(tmp_path / "imagenet", 1000)
    write_data(tmp_path / "imagenet-a", 200)
    dataset = load_dataset("imagenet")
    assert dataset.shifts == ("imagenet-a",)  # of the five, the one whose data is here
    assert load_dataset("imagenet-a").class_names[0] == "stingray"


def test_imagenet_a_and_r_are_subsets_in_imagenets_order():
    whole = CARDS["imagenet"].named_classes()
    for name in ("imagenet-a", "imagenet-r"):
        card = CARDS[name]
        labels = card.subset_labels()
        assert list(labels) == sorted(labels)
        assert card.named_classes() == tuple(whole[label] for label in labels)
        assert card.class_folders() == tuple(
            CARDS["imagenet"].class_folders()[label] for label in labels
        )


def test_number_of_classes_must_be_the_cards(tmp_path):
    root = write_data(tmp_path / "d", 2)
    (root / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(VlkrError, match=r"classnames\.txt has 2 classes, the card 10"):
        load_dataset(f"eurosat={root}")


def test_another_set_of_templates(tmp_path):
    root = write_data(tmp_path / "d", 10)
    assert load_dataset(f"eurosat={root}").template_set == "coop (1)"
    dataset = load_dataset(f"eurosat={root}", templates=["clip-benchmark"])
    assert dataset.template_set == "clip-benchmark (3)"
    assert dataset.templates[1] == "a centered satellite photo of a {c}."
    assert load_dataset(f"eurosat={root}", templates=["kradapter"]).templates == (
        "An image of {c}",
    )
    with pytest.raises(VlkrError, match="template 'nothing' lacks the placeholder"):
        load_dataset(f"eurosat={root}", templates=["nothing"])


GOOD = {
    "name": "x",
    "title": "X",
    "source": "here",
    "licence": "MIT",
    "class_names": ["a", "b"],
    "templates": ["a {c}"],
}


@pytest.fixture
def write_card(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "resource", lambda name: tmp_path)

    def write(content):
        (tmp_path / "x.yaml").write_text(
            content if isinstance(content, str) else yaml.safe_dump(content)
        )
        return load_card("x")

    return write


def test_a_list_of_templates_is_a_set(write_card):
    assert write_card(GOOD).templates == {"x card": ("a {c}",)}
    assert write_card(GOOD | {"templates": {"t": "open_clip:X"}}).templates == {"t": "open_clip:X"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "holds a list, expected a mapping"),
        ("a: [", "is not valid YAML"),
        (GOOD | {"color": 1}, "color: Unexpected keyword argument, got 1"),
        (GOOD | {"title": 3}, "title: Input should be a valid string, got 3"),
        (GOOD | {"title": None}, "title: Input should be a valid string, got None"),
        (GOOD | {"class_names": [1, 2]}, r"class_names: .* valid string, got \[1, 2\]"),
        (GOOD | {"class_names": {"a": "b"}}, "class_names: .*, got {'a': 'b'}"),
        (GOOD | {"subset": ["a"]}, r"subset: .* valid integer, got \['a'\]"),
        (GOOD | {"subset": [True]}, r"subset: .* valid integer, got \[True\]"),
        (GOOD | {"splits": {"test": "many"}}, "splits: .* valid integer, got {'test': 'many'}"),
        (GOOD | {"templates": {"t": [1]}}, r"templates: .* valid string, got {'t': \[1\]}"),
        (GOOD | {"title": "\ud800"}, "Invalid JSON"),
        (GOOD | {"title": datetime.date(2020, 1, 1)}, "date is not JSON serializable"),
        (GOOD | {"name": "y"}, "is named 'y', expected 'x'"),
        ({"name": "x"}, "title: Field required"),
    ],
)
def test_cards_that_are_not_valid(write_card, content, message):
    with pytest.raises(VlkrError, match=rf"x\.yaml.* {message}"):
        write_card(content)


def test_every_file_in_data_belongs_to_a_card():
    shipped = {card.shards for card in CARDS.values() if card.shards}
    for path in (ROOT / "data").iterdir():
        assert (path.name in shipped) if path.is_dir() else path.stem in CARDS
