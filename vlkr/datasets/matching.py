"""Brings together what a card says of the classes and what the data says."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlkr.datasets.cards import Card
from vlkr.datasets.folders import Listing
from vlkr.datasets.samples import FileSource
from vlkr.errors import VlkrError


def matched(listing: Listing, card: Card, place: str) -> Listing:
    """The listing with the card's class names and in the order of its labels.

    Class folders are found by the card's names of them, or else of the classes, whatever their
    case and punctuation, or by number; numbers in a table are labels. Names written for people, in
    CoOp's split files and in tables, stay as they are. A folder without splits is all test images
    if the card knows no other split.

    Raises:
        VlkrError: if a class of one has no counterpart in the other.
    """
    names = card.named_classes()
    if names is not None and listing.named_by != "names":
        labels = _labels(listing, card, names, place)
        splits = {split: _relabeled(files, labels) for split, files in listing.splits.items()}
        listing = replace(listing, classes=names, splits=splits)
    splits = dict(listing.splits)
    if "test" not in splits and card.test_folder in splits:
        splits["test"] = splits.pop(card.test_folder)
    if "" in splits and list(card.splits) == ["test"]:
        splits["test"] = splits.pop("")
    return replace(listing, splits=splits)


def _relabeled(source: FileSource, labels: Mapping[int, int]) -> FileSource:
    return replace(source, files=[f._replace(label=labels[f.label]) for f in source.files])


def _labels(listing: Listing, card: Card, names: Sequence[str], place: str) -> Mapping[int, int]:
    """The card's label of each label of the listing."""
    if _are_numbers(listing.classes):
        if len(listing.classes) != len(names):
            raise VlkrError(
                f"{place} has {len(listing.classes)} numbered classes, card {card.name!r} "
                f"{len(names)}"
            )
        return {label: label for label in range(len(names))}
    folders = card.class_folders() or names
    known = {_plain(folder): label for label, folder in enumerate(folders)}
    labels: dict[int, int] = {}
    for label, name in enumerate(listing.classes):
        if _plain(name) in known:
            labels[label] = known[_plain(name)]
        else:
            near = difflib.get_close_matches(name, folders, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise VlkrError(f"class {name!r} of {place} is not on card {card.name!r}{hint}")
    if missing := sorted(set(range(len(folders))) - set(labels.values())):
        raise VlkrError(f"{place} lacks class {folders[missing[0]]!r} of card {card.name!r}")
    if len(labels) > len(folders):
        raise VlkrError(f"{place} has two folders for a class of card {card.name!r}")
    return labels


def _are_numbers(classes: Sequence[str]) -> bool:
    return set(classes) == {str(label) for label in range(len(classes))}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())
