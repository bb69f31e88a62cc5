"""Datasets by name or by path: class names, templates, domains and splits."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vlkr.datasets.cards import Card, card_names, load_card
from vlkr.datasets.lists import SPLITS, TABLES, Listing, read_listing
from vlkr.datasets.prompts import check_templates, resolve_list, resolve_templates
from vlkr.datasets.remote import LocalRoot, is_address, open_root
from vlkr.datasets.samples import (
    FileSource,
    ImageFile,
    Source,
    TorchvisionSource,
    View,
    unit_hash,
)
from vlkr.datasets.shards import Layout, holds_shards, read_layout
from vlkr.errors import VlkrError
from vlkr.files import resource

DEFAULT_TEMPLATES = ("a photo of a {c}.",)


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before an image is read.

    Attributes:
        name: the card's, or the folder's.
        class_names: by label.
        templates: prompts with the placeholder ``{c}``.
        splits: sources by ``"train"``, ``"val"``, ``"test"``.
        template_set: where the templates come from, for captions.
        shifts: names of the available datasets that shift this one's domain.
        sizes: images per split, where that is known.
        domains: names of the samples' domains, if they have some.
        template_sets: the card's sets of templates by name, or where to find them.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    splits: Mapping[str, Source]
    template_set: str
    shifts: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    template_sets: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    def source(self, split: str) -> Source:
        """The samples of a split.

        Raises:
            VlkrError: if the dataset has no such split.
        """
        if split not in self.splits:
            raise VlkrError(
                f"dataset {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        return self.splits[split]

    def select(
        self,
        *,
        domains: Collection[str] | None = None,
        classes: Literal["all", "base", "new"] = "all",
    ) -> Dataset:
        """The same dataset with some of its samples.

        Args:
            domains: whose samples are kept; None keeps all.
            classes: ``"base"`` keeps the first ``ceil(n / 2)`` labels (CoCoOp, arXiv 2203.05557),
                ``"new"`` the others, renumbered from 0.

        Raises:
            VlkrError: for a domain that it does not have, no domain, or a half of one class.
        """
        selected = self if domains is None else self._select_domains(domains)
        return selected if classes == "all" else selected._select_classes(classes)

    def _select_domains(self, domains: Collection[str]) -> Dataset:
        for domain in domains:
            if domain not in self.domains:
                known = f"it has {', '.join(self.domains)}" if self.domains else "it has none"
                raise VlkrError(f"dataset {self.name!r} has no domain {domain!r}; {known}")
        kept = tuple(domain for domain in self.domains if domain in domains)
        if not kept:
            raise VlkrError(f"no domain of dataset {self.name!r} given")
        splits: dict[str, Source] = {}
        for name, source in self.splits.items():
            if isinstance(source, FileSource):
                files = [file for file in source.files if file.domain in kept]
                splits[name] = replace(source, files=files)
            else:
                splits[name] = View(source, domains=kept)
        return replace(self, splits=splits, sizes={}, domains=kept)

    def _select_classes(self, half: Literal["base", "new"]) -> Dataset:
        number = len(self.class_names)
        middle = -(-number // 2)
        labels = range(middle) if half == "base" else range(middle, number)
        if len(labels) < 2:
            raise VlkrError(
                f"the {half} half of {self.name!r} has {len(labels)} of {number} classes, "
                "expected two or more"
            )
        splits = {name: View(source, labels=labels) for name, source in self.splits.items()}
        names = self.class_names[labels.start : labels.stop]
        return replace(self, class_names=names, splits=splits, sizes={})

    def with_templates(self, given: Sequence[str] | None) -> Dataset:
        """The same dataset with different templates.

        Args:
            given: the name of one of its card's sets, or what
                :func:`~vlkr.datasets.prompts.resolve_templates` takes; None leaves its own.

        Raises:
            VlkrError: for an empty list, or an entry that is not a template, set or file.
        """
        if given is None:
            return self
        if len(given) == 1 and given[0] in self.template_sets:
            templates = resolve_list(self.template_sets[given[0]])
            check_templates(templates)
            return replace(self, templates=templates, template_set=f"{given[0]} ({len(templates)})")
        chosen = resolve_templates(given)
        return replace(self, templates=chosen.templates, template_set=chosen.name)

    @classmethod
    def from_torchvision(
        cls,
        splits: Mapping[str, Any],
        *,
        name: str | None = None,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ) -> Dataset:
        """Wraps classification datasets that give PIL images and integers.

        Args:
            splits: dataset objects by ``"train"``, ``"val"``, ``"test"``, without transforms.
            name: for captions; the class's name by default.
            class_names: by label; their ``classes`` by default.
            templates: prompts with ``{c}``.

        Raises:
            VlkrError: for an unknown split, a dataset with a transform, or class names that are
                missing or differ between the splits.

        >>> import torchvision.datasets
        >>> images = torchvision.datasets.FakeData(size=4, num_classes=2)
        >>> dataset = Dataset.from_torchvision({"test": images}, class_names=["cat", "dog"])
        >>> [sample.key for sample in dataset.source("test")]
        ['0000000', '0000001', '0000002', '0000003']
        """
        if not splits or not set(splits) <= set(SPLITS):
            raise VlkrError(f"splits are {list(splits)}, expected some of {', '.join(SPLITS)}")
        check_templates(templates)
        if class_names is None:
            lists = [tuple(map(str, getattr(d, "classes", ()))) for d in splits.values()]
            if not lists[0] or any(names != lists[0] for names in lists):
                raise VlkrError("the datasets do not tell the same classes; give class_names")
            class_names = lists[0]
        number = len(class_names)
        return cls(
            name or type(next(iter(splits.values()))).__name__,
            tuple(class_names),
            tuple(templates),
            {split: TorchvisionSource(dataset, number) for split, dataset in splits.items()},
            f"given ({len(templates)})",
        )


def load_dataset(
    reference: str | Path,
    *,
    templates: Sequence[str] | None = None,
    test_fraction: float = 0.5,
    allow_commands: bool = False,
) -> Dataset:
    """Finds a dataset.

    Args:
        reference: one of

            - a card's name (as a string), whose data ships or is in ``$VLKR_DATA/<name>``;
            - a folder of images, ``<class>/*`` or ``<domain>/<class>/*``, or either below
              ``<split>/``;
            - a list of images, ``split_zhou_*.json`` (or the folder that holds it), ``*.csv`` or
              ``*.jsonl``;
            - a folder of webdataset shards in CLIP_benchmark's layout, also at ``https://...`` or
              ``hf://datasets/org/name``, or by CLIP_benchmark's name, ``wds/imagenet-r``;
            - ``NAME=PLACE``: one of the last three with a card's class names, prompts and shifts.
        templates: prompts to use in place of the dataset's own, as
            :meth:`Dataset.with_templates` takes them.
        test_fraction: of images without splits, the part that is held out as their test split.
            Which images those are depends on their names alone.
        allow_commands: allow ``pipe:COMMAND`` to run.

    Raises:
        VlkrError: for an unknown name, a place that is missing or cannot be read, or a card that
            is not valid or does not match the data.
    """
    if not 0 < test_fraction < 1:
        raise VlkrError(f"test fraction {test_fraction} is out of range, expected between 0 and 1")
    card, place = _find(reference)
    if isinstance(place, str) or holds_shards(place):
        root = open_root(place, allow_commands) if isinstance(place, str) else LocalRoot(place)
        layout = read_layout(root, card.named_classes() if card else None)
    else:
        layout = _layout_of_listing(read_listing(place), place, card, test_fraction)
    name, own_templates = _name(place, card), layout.templates or DEFAULT_TEMPLATES
    if len(layout.class_names) < 2:
        raise VlkrError(f"dataset {name!r} has one class only, expected two or more")
    # A card has the sizes of the bundled data; other data may be a part of the dataset.
    ships = card is not None and card.shards is not None and place == local_path(card)
    dataset = Dataset(
        name,
        layout.class_names,
        own_templates,
        layout.splits,
        f"{name if layout.templates else 'default'} ({len(own_templates)})",
        # Of the shifts, those whose data is available.
        tuple(shift for shift in card.shifts if local_path(load_card(shift))) if card else (),
        card.splits if card and ships else layout.sizes,
        layout.domains,
    )
    if card:
        dataset = replace(dataset, template_sets=card.templates)
        dataset = dataset.with_templates([next(iter(card.templates))])
    check_templates(dataset.templates)
    return dataset.with_templates(templates)


def describe_dataset(
    name: str, test_fraction: float, domains: Collection[str] | None
) -> Dataset | None:
    """Describes a dataset by its card, without its data and without splits.

    Returns:
        None if there is no such card, or only the data has the class names.

    Raises:
        VlkrError: for a domain that the card does not know.
    """
    if name not in card_names():
        return None
    card = load_card(name)
    names = card.named_classes()
    if names is None:
        return None
    sizes: dict[str, int] = dict(card.splits)
    chosen = tuple(card.domains if domains is None else domains)
    if unknown := [domain for domain in chosen if domain not in card.domains]:
        known = ", ".join(card.domains) or "none"
        raise VlkrError(f"card {name!r} has no domain {unknown[0]!r}; it has {known}")
    if chosen:
        images = sum(card.domains[domain] for domain in chosen)
        sizes = {"test": round(test_fraction * images)}
        sizes["train"] = images - sizes["test"]
    dataset = Dataset(name, names, (), {}, "", card.shifts, sizes, chosen, card.templates)
    return dataset.with_templates([next(iter(card.templates))])


def local_path(card: Card) -> Path | None:
    """The folder of a card's data that ships or is in ``$VLKR_DATA``; None if it is in neither."""
    if card.shards:
        return resource("data") / card.shards
    folder = Path(os.environ.get("VLKR_DATA") or "-") / card.name
    return folder if folder.is_dir() else None


def _find(reference: str | Path) -> tuple[Card | None, str | Path]:
    """The card that a reference names, if any, and the address or path of the data."""
    if isinstance(reference, Path):
        return None, _checked(reference)
    cards = card_names()
    name, _, place = reference.partition("=")
    if name not in cards:
        if is_address(reference):
            return None, reference
        if not Path(reference).exists():
            near = difflib.get_close_matches(name, cards, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "vlkr data list shows the cards"
            raise VlkrError(f"no dataset {reference!r}: neither a path nor a card; {hint}")
        return None, _checked(Path(reference))
    card = load_card(name)
    if place:
        return card, place if is_address(place) else _checked(Path(place))
    path = local_path(card)
    if path is None:
        hub = f", or {name}={card.wds} to stream it" if card.wds else ""
        raise VlkrError(
            f"{name} is known ({card.title}) but its data is not here: give its place, "
            f"{name}=DIR{hub}, or put it at $VLKR_DATA/{name}"
        )
    return card, _checked(path)


def _checked(path: Path) -> Path:
    """The folder or list of images; of a folder with one of CoOp's lists, that list."""
    if not path.exists():
        raise VlkrError(f"no folder or file at {path}")
    if path.is_dir():
        lists = list(path.glob("split_zhou_*.json"))
        return lists[0] if len(lists) == 1 else path
    if path.suffix not in TABLES:
        raise VlkrError(f"{path} is not a folder or a list of images ({', '.join(TABLES)})")
    return path


def _layout_of_listing(
    listing: Listing, place: Path, card: Card | None, test_fraction: float
) -> Layout:
    if card:
        listing = _matched(listing, card, place)
    splits: Mapping[str, Source] = listing.splits
    if "" in listing.splits:
        parts: dict[str, list[ImageFile]] = {"train": [], "test": []}
        for file in listing.splits[""].files:
            parts["test" if unit_hash(file.path) < test_fraction else "train"].append(file)
        splits = {name: replace(listing.splits[""], files=files) for name, files in parts.items()}
    # Caltech-256 and CUB number their folders: 001.Black_footed_Albatross.
    names = tuple(re.sub(r"^\d+\.", "", name).replace("_", " ") for name in listing.classes)
    return Layout(names, splits, domains=listing.domains)


def _matched(listing: Listing, card: Card, place: Path) -> Listing:
    """The listing with the card's class names and in the order of its labels.

    Class folders are matched to the card's folder names, or else to its class names, whatever
    their case and punctuation, or by number; numbers in a table are labels. Names written for
    people, in CoOp's split files and in tables, stay as they are. A folder without splits is all
    test images if the card knows no other split.
    """
    splits = dict(listing.splits)
    names = card.named_classes()
    if names is not None and listing.named_by != "names":
        labels = _card_labels(listing.classes, card, names, place)
        for split, source in splits.items():
            files = [file._replace(label=labels[file.label]) for file in source.files]
            splits[split] = replace(source, files=files)
        listing = replace(listing, classes=names)
    if "test" not in splits and card.test_folder in splits:
        splits["test"] = splits.pop(card.test_folder)
    if "" in splits and list(card.splits) == ["test"]:
        splits["test"] = splits.pop("")
    return replace(listing, splits=splits)


def _card_labels(
    classes: Sequence[str], card: Card, names: Sequence[str], place: Path
) -> Sequence[int]:
    """The card's label of each label of a listing."""
    if set(classes) == {str(label) for label in range(len(classes))}:
        if len(classes) != len(names):
            raise VlkrError(
                f"{place} has {len(classes)} numbered classes, card {card.name!r} {len(names)}"
            )
        return range(len(names))
    folders = card.class_folders() or names
    known = {_letters(folder): label for label, folder in enumerate(folders)}
    labels: list[int] = []
    for name in classes:
        if _letters(name) not in known:
            near = difflib.get_close_matches(name, folders, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise VlkrError(f"class {name!r} of {place} is not on card {card.name!r}{hint}")
        labels.append(known[_letters(name)])
    if missing := sorted(set(range(len(folders))) - set(labels)):
        raise VlkrError(f"{place} lacks class {folders[missing[0]]!r} of card {card.name!r}")
    if len(labels) > len(folders):
        raise VlkrError(f"{place} has two folders for a class of card {card.name!r}")
    return labels


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _name(place: str | Path, card: Card | None) -> str:
    if card:
        return card.name
    if isinstance(place, Path):
        return place.stem if place.is_file() else place.name
    return place if place.startswith(("wds/", "pipe:")) else place.rstrip("/").rpartition("/")[2]
