"""Cards: facts about known datasets, ``data/<name>.yaml``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vlkr.errors import VlkrError
from vlkr.files import read_yaml, resource

FROM_DATA = "from data"
SUITES = ("coop", "kradapter", "imagenet-shift", "domainbed", "vtab")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a dataset without its data.

    A list that a package ships is named instead of copied: ``open_clip:IMAGENET_CLASSNAMES``,
    ``timm:imagenet_r_indices``.

    Attributes:
        name: of the file.
        title: for people.
        source: where the data comes from: URL, paper, how it was made.
        licence: of the images.
        class_names: by label; ``"from data"`` where only the data tells.
        templates: sets of prompts with ``{c}`` by name, the default one first.
        splits: images per split.
        suites: benchmarks that the dataset is part of, of ``SUITES``.
        folders: names of the class folders by label, where they are not the class names.
        subset: the labels in both lists that the dataset has; none for all.
        test_folder: the split that is tested on, where it is not called ``test``.
        domains: images per domain.
        shifts: cards of datasets that shift this one's domain.
        shift_of: the card whose shift this is.
        shards: folder beside the card that holds the data, if it ships.
        wds: CLIP_benchmark's name, under which the hub has the data.
    """

    name: str
    title: str
    source: str
    licence: str
    class_names: str | Sequence[str]
    templates: Mapping[str, str | Sequence[str]]
    splits: Mapping[str, int] = field(default_factory=dict)
    suites: Sequence[str] = ()
    folders: str | Sequence[str] = ()
    subset: str | Sequence[int] = ()
    test_folder: str = "test"
    domains: Mapping[str, int] = field(default_factory=dict)
    shifts: Sequence[str] = ()
    shift_of: str | None = None
    shards: str | None = None
    wds: str | None = None

    def named_classes(self) -> tuple[str, ...] | None:
        """The names by label; None where only the data tells."""
        return None if self.class_names == FROM_DATA else self._of_subset(self.class_names)

    def class_folders(self) -> tuple[str, ...]:
        """Names of the class folders by label; none where they are the class names."""
        return self._of_subset(self.folders)

    def _of_subset(self, value: str | Sequence[str]) -> tuple[str, ...]:
        whole = resolve(value)
        labels = [int(label) for label in resolve(self.subset)]
        return tuple(whole[label] for label in labels) if labels and whole else whole


_KINDS = {item.name: str(item.type) for item in fields(Card)}


def card_names() -> list[str]:
    """The names of all cards."""
    return sorted(path.stem for path in resource("data").glob("*.yaml"))


def load_card(name: str) -> Card:
    """Reads a card.

    Raises:
        VlkrError: if it is missing, or a field is not known, missing or of another kind.
    """
    path = resource("data") / f"{name}.yaml"
    values = read_yaml(path)
    if isinstance(templates := values.get("templates"), list):
        values["templates"] = {f"{name} card": templates}
    for key, value in values.items():
        if key not in _KINDS:
            raise VlkrError(f"card {path} has the field {key!r}, expected {', '.join(_KINDS)}")
        if not _is_kind(value, _KINDS[key]):
            raise VlkrError(f"card {path}: {key} is {value!r}, expected {_KINDS[key]}")
    try:
        card = Card(**values)
    except TypeError as error:  # names what is missing
        raise VlkrError(f"card {path} is not valid: {error}") from error
    if card.name != name:
        raise VlkrError(f"card {path} is named {card.name!r}, expected {name!r}")
    return card


def _is_kind(value: Any, kind: str) -> bool:
    """Whether YAML's value is of a field's type, as its annotation tells it."""
    if isinstance(value, list):
        entry = int if "Sequence[int]" in kind else str
        return "Sequence" in kind and all(isinstance(item, entry) for item in value)
    if isinstance(value, dict):
        inner = kind.partition(", ")[2].removesuffix("]")
        return "Mapping" in kind and all(_is_kind(item, inner) for item in value.values())
    if isinstance(value, int):
        return kind == "int"
    return isinstance(value, str) and kind.startswith("str")


def resolve(value: str | Sequence[Any]) -> tuple[Any, ...]:
    """A list as it stands, or the one in a package that ``package:name`` names."""
    if not isinstance(value, str):
        return tuple(value)
    # Only vlkr.models knows open_clip and timm, which take seconds to import.
    models = importlib.import_module("vlkr.models.class_names")
    found: tuple[str, ...] = models.shipped(value)
    return found
