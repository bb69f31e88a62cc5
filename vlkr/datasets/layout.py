"""CLIP_benchmark's layout: shards by split, with class names and prompts beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vlkr.datasets.lists import SPLITS
from vlkr.datasets.remote import MissingError
from vlkr.datasets.roots import LocalRoot, Root
from vlkr.datasets.samples import Source
from vlkr.datasets.shards import ShardSource
from vlkr.errors import VlkrError

_MAX_TEXT = 2**22
_MAX_SHARDS = 10**6


@dataclass(frozen=True)
class Layout:
    """What lies at a root.

    Attributes:
        class_names: by label.
        splits: shards by split.
        templates: prompts with ``{c}``; none where the layout has none.
        domains: names that the samples use; none where it has none.
        sizes: images per split, where ``vlkr data pack`` has counted them.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, Source]
    templates: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


def holds_shards(folder: Path) -> bool:
    """Whether a folder is laid out so."""
    return (folder / "classnames.txt").is_file() or any(
        next((folder / split).glob("*.tar"), None) for split in SPLITS
    )


def read_layout(root: Root, class_names: Sequence[str] | None = None) -> Layout:
    """Reads what lies beside the shards, and none of them.

    Args:
        root: of the layout: ``classnames.txt``, ``zeroshot_classification_templates.txt``, and
            ``<split>/nshards.txt`` beside ``<split>/{0..n-1}.tar``; from ``vlkr data pack`` also
            ``domains.txt`` and ``manifest.json``.
        class_names: in place of those at the root.

    Raises:
        VlkrError: if something cannot be read, there is no split, no class name, or another number
            of them than given.
    """
    own = _lines(root, "classnames.txt")
    names = tuple(class_names or own)
    if not names:
        raise VlkrError(f"no class names in {root.where('classnames.txt')}, expected one a line")
    if own and len(own) != len(names):
        raise VlkrError(
            f"{root.where('classnames.txt')} has {len(own)} classes, the card {len(names)}"
        )
    domains = _lines(root, "domains.txt")
    splits: dict[str, ShardSource] = {}
    for split in SPLITS:
        with suppress(MissingError):
            splits[split] = ShardSource(root, shard_names(root, split), len(names), domains)
    if not splits:
        raise VlkrError(
            f"no split in {root.where('')}, expected {', '.join(SPLITS)} with nshards.txt and 0.tar"
        )
    templates = _lines(root, "zeroshot_classification_templates.txt")
    return Layout(names, splits, tuple(filter(None, templates)), domains, _sizes(root, splits))


def shard_names(root: Root, split: str) -> list[str]:
    """Paths of the tars of a split, ``<split>/{0..n-1}.tar`` with n in ``<split>/nshards.txt``.

    Without that file a folder's ``<split>/*.tar`` are taken in the order of their names.

    Raises:
        MissingError: if there are none.
        VlkrError: if one that ``nshards.txt`` counts is not in the folder.
    """
    count_file = f"{split}/nshards.txt"
    folder = root.folder / split if isinstance(root, LocalRoot) else None
    try:
        text = _read_text(root, count_file).strip()
    except MissingError:
        names = sorted(path.name for path in folder.glob("*.tar")) if folder else []
        if not names:
            raise
        return [f"{split}/{name}" for name in names]
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= _MAX_SHARDS:
        raise VlkrError(
            f"{root.where(count_file)} holds {text[:40]!r}, expected the number of shards"
        )
    names = [f"{i}.tar" for i in range(int(text))]
    for name in names:
        if folder and not (folder / name).is_file():
            raise VlkrError(f"shard {folder / name} is missing, {count_file} counts {text}")
    return [f"{split}/{name}" for name in names]


def _sizes(root: Root, splits: Mapping[str, ShardSource]) -> dict[str, int]:
    try:
        content = json.loads(_read_text(root, "manifest.json"))
        return {split: int(content["splits"][split]["samples"]) for split in splits}
    except MissingError:
        return {}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise VlkrError(f"{root.where('manifest.json')} is not valid: {error!r}") from error


def _lines(root: Root, path: str) -> tuple[str, ...]:
    """The lines of a text file, none if it is missing; empty ones at the end do not count.

    In their midst they do: CLIP_benchmark has a dataset whose fourth class has no name.
    """
    try:
        text = _read_text(root, path)
    except MissingError:
        return ()
    return tuple(line.strip() for line in text.rstrip().splitlines())


def _read_text(root: Root, path: str) -> str:
    with root.open(path) as stream:
        content = stream.read(_MAX_TEXT + 1)
    if len(content) > _MAX_TEXT:
        raise VlkrError(f"{root.where(path)} has more than the {_MAX_TEXT:,} bytes allowed")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise VlkrError(f"cannot read {root.where(path)}: {error}") from error
