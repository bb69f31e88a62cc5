"""Folders of images: a class each, with or without splits or domains above."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlkr.datasets.samples import IMAGE_EXTENSIONS, FileSource, ImageFile
from vlkr.errors import VlkrError

SPLITS = ("train", "val", "test")
_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class Listing:
    """Image files and what is known of them, before a card has its say.

    Attributes:
        classes: by label, as the data spells them.
        splits: files by split; under ``""`` where the data has no splits.
        domains: names, sorted; none where the data has no domains.
        named_by: what ``classes`` are: names of ``"folders"``, ``"names"`` that somebody wrote for
            people, or ``"numbers"`` without a name.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, FileSource]
    domains: tuple[str, ...] = ()
    named_by: str = "folders"


def read_folder(root: Path) -> Listing:
    """Lists ``<class>/*`` or ``<domain>/<class>/*``, either below ``<split>/`` if there are splits.

    Folders are domains (DomainBed's layout) if there are two or more, none has an image of its own,
    and all have the same two or more folders. Images may lie at any depth below a class. Folders
    whose names are the numbers from 0 on are labels.

    Raises:
        VlkrError: if a folder cannot be read, or a class is empty or not in every split and domain.
    """
    try:
        return _read_splits(root)
    except OSError as error:
        raise VlkrError(f"cannot read {error.filename}: {error.strerror}") from error


def _read_splits(root: Path) -> Listing:
    roots = {split: root / split for split in SPLITS if (root / split).is_dir()} or {"": root}
    trees = {split: _read_tree(path) for split, path in roots.items()}
    first = next(iter(trees.values()))
    for tree in trees.values():
        if odd := sorted(set(tree.classes) ^ set(first.classes)):
            raise VlkrError(f"class {odd[0]!r} is not in every split of {root}")
        if tree.domains != first.domains:
            odd = sorted(set(tree.domains) ^ set(first.domains))
            raise VlkrError(f"domain {odd[0]!r} is not in every split of {root}")
    splits = {split: tree.splits[""] for split, tree in trees.items()}
    return Listing(first.classes, splits, first.domains)


def _read_tree(root: Path) -> Listing:
    names = _subfolders(root)
    if not names:
        raise VlkrError(f"no class folders in {root}, expected {root}/<class>/<image>")
    domains = names if _are_domains(root, names) else ()
    classes = _in_order(_subfolders(root / domains[0]) if domains else names)
    files: list[ImageFile] = []
    for domain in domains or (None,):
        for label, name in enumerate(classes):
            folder = name if domain is None else f"{domain}/{name}"
            paths = [f"{folder}/{path}" for path in image_files(root / folder)]
            if not paths:
                raise VlkrError(f"class {name!r} is empty: no image in {root / folder}")
            files += [ImageFile(path, label, domain) for path in paths]
    return Listing(classes, {"": FileSource(root, files)}, domains)


def _are_domains(root: Path, names: tuple[str, ...]) -> bool:
    if len(names) < 2:
        return False
    inner: list[tuple[str, ...]] = []
    for name in names:
        with os.scandir(root / name) as entries:
            if any(entry.name.lower().endswith(_SUFFIXES) for entry in entries):
                return False
        inner.append(_subfolders(root / name))
        common = set(inner[0]).intersection(*inner)
        if len(common) < 2:
            return False
    for name, classes in zip(names, inner, strict=True):
        if odd := sorted(set(classes) ^ set(inner[0])):
            raise VlkrError(
                f"{root} looks like <domain>/<class>/<image>, but {odd[0]!r} is not in both "
                f"{names[0]!r} and {name!r}; add it, or list the images in a CSV file"
            )
    return True


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    numbers = {str(i): i for i in range(len(names))}
    return tuple(sorted(names, key=numbers.__getitem__)) if set(names) == set(numbers) else names


def _subfolders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
    return tuple(sorted(names))


def image_files(folder: Path) -> list[str]:
    """Paths, relative to ``folder``, of the images at any depth below it that are not hidden.

    Raises:
        VlkrError: if a name is not UTF-8.
    """
    return sorted(_walk(str(folder), ""))


def _walk(folder: str, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, f"{prefix}{name}/")
            elif name.lower().endswith(_SUFFIXES) and entry.is_file():
                if not name.isascii() and name != name.encode(errors="replace").decode():
                    raise VlkrError(f"the file name {name!r} in {folder} is not UTF-8")
                yield prefix + name
