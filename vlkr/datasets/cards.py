"""Cards: facts about known datasets, ``data/<name>.yaml``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vlkr.datasets.prompts import resolve_list
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
        class_names: by label; ``"from data"`` where only the data has them.
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

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    title: str
    source: str
    licence: str
    class_names: str | tuple[str, ...]
    templates: dict[str, str | tuple[str, ...]]
    splits: dict[str, int] = field(default_factory=dict)
    suites: tuple[str, ...] = ()
    folders: str | tuple[str, ...] = ()
    subset: str | tuple[int, ...] = ()
    test_folder: str = "test"
    domains: dict[str, int] = field(default_factory=dict)
    shifts: tuple[str, ...] = ()
    shift_of: str | None = None
    shards: str | None = None
    wds: str | None = None

    def named_classes(self) -> tuple[str, ...] | None:
        """The class names by label; None where only the data has them."""
        return None if self.class_names == FROM_DATA else self._of_subset(self.class_names)

    def class_folders(self) -> tuple[str, ...]:
        """Names of the class folders by label; none where they are the class names."""
        return self._of_subset(self.folders)

    def subset_labels(self) -> tuple[int, ...]:
        """The labels in the whole list that the dataset has; none for all."""
        subset = resolve_list(self.subset) if isinstance(self.subset, str) else self.subset
        return tuple(int(label) for label in subset)

    def _of_subset(self, value: str | tuple[str, ...]) -> tuple[str, ...]:
        whole, labels = resolve_list(value), self.subset_labels()
        return tuple(whole[label] for label in labels) if labels and whole else whole


_CARD = TypeAdapter(Card)


def card_names() -> list[str]:
    """The names of all cards."""
    return sorted(path.stem for path in resource("data").glob("*.yaml"))


def load_card(name: str) -> Card:
    """Reads a card.

    Raises:
        VlkrError: if it is missing, or a field is unknown, missing or of the wrong type.
    """
    path = resource("data") / f"{name}.yaml"
    values = read_yaml(path)
    if isinstance(templates := values.get("templates"), list):
        values["templates"] = {f"{name} card": templates}
    try:
        # As JSON, for in strict mode Python's lists are not tuples.
        card = _CARD.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problem = max(error.errors(), key=lambda problem: len(problem["loc"]))
        fields = [str(part) for part in problem["loc"][:1]]
        given = f", got {values[fields[0]]!r}" if fields and fields[0] in values else ""
        raise VlkrError(f"card {': '.join([str(path), *fields, problem['msg']])}{given}") from error
    except (TypeError, ValueError) as error:  # such as a date
        raise VlkrError(f"card {path} is not valid: {error}") from error
    if card.name != name:
        raise VlkrError(f"card {path} is named {card.name!r}, expected {name!r}")
    return card
