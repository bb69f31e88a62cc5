"""Lists of image files: folders of classes, CSV, JSON Lines and CoOp's splits."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlkr.datasets.samples import IMAGE_EXTENSIONS, FileSource, ImageFile, is_safe_path
from vlkr.errors import VlkrError
from vlkr.files import read_json

SPLITS = ("train", "val", "test")
TABLES = (".json", ".csv", ".jsonl")
_COLUMNS = ("path", "label", "domain", "split")
_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class Listing:
    """Image files and what is known of them without a card.

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


def read_listing(path: Path) -> Listing:
    """Lists the images of a folder, or those that a table names.

    - A folder holds ``<class>/*`` or ``<domain>/<class>/*``, either below ``<split>/`` if there are
      splits. Folders are domains (DomainBed's layout) if there are two or more, none has an image
      of its own, and all have the same two or more folders. Images may be at any depth below a
      class. Folders whose names are the numbers from 0 on are labels.
    - ``.csv`` has a heading, ``.jsonl`` an object per line, with ``path`` (relative to the file),
      ``label`` (a class's name or number) and, if wanted, ``domain`` and ``split`` (train, val or
      test).
    - ``.json`` is CoOp's ``split_zhou_*.json``: ``[path, label, class name]`` by split. The images
      are beside it or in one of the folders beside it.

    Raises:
        VlkrError: for what cannot be read; a class that is empty or not in every split and domain;
            a path that is absolute, leads out of the folder or is listed twice; labels that are not
            0 to n - 1, or do not go with one name each; a column that only some lines fill.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.suffix == ".json":
            return _read_coop(path)
        return _from_rows(path, _csv_rows(path) if path.suffix == ".csv" else _json_rows(path))
    except OSError as error:
        raise VlkrError(f"cannot read {error.filename}: {error.strerror}") from error
    except (UnicodeDecodeError, RecursionError, csv.Error) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error


def image_files(folder: Path) -> list[str]:
    """Relative paths of the images at any depth below ``folder`` that are not hidden."""
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


def _read_folder(root: Path) -> Listing:
    roots = {split: root / split for split in SPLITS if (root / split).is_dir()} or {"": root}
    trees = {split: _read_tree(path) for split, path in roots.items()}
    first = next(iter(trees.values()))
    for tree in trees.values():
        if odd := sorted(set(tree.classes) ^ set(first.classes)):
            raise VlkrError(f"class {odd[0]!r} is not in every split of {root}")
        if odd := sorted(set(tree.domains) ^ set(first.domains)):
            raise VlkrError(f"domain {odd[0]!r} is not in every split of {root}")
    splits = {split: tree.splits[""] for split, tree in trees.items()}
    return Listing(first.classes, splits, first.domains)


def _read_tree(root: Path) -> Listing:
    names = _subfolders(root)
    if not names:
        raise VlkrError(f"no class folders in {root}, expected {root}/<class>/<image>")
    domains = names if _are_domains(root, names) else ()
    classes = _subfolders(root / domains[0]) if domains else names
    if _are_numbers(classes):
        classes = tuple(sorted(classes, key=int))
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
    classes: dict[str, tuple[str, ...]] = {}
    for name in names:
        with os.scandir(root / name) as entries:
            if any(entry.name.lower().endswith(_SUFFIXES) for entry in entries):
                return False
        classes[name] = _subfolders(root / name)
        if len(set.intersection(*map(set, classes.values()))) < 2:
            return False
    for name in names:
        if odd := sorted(set(classes[name]) ^ set(classes[names[0]])):
            raise VlkrError(
                f"{root} looks like <domain>/<class>/<image>, but {odd[0]!r} is not in both "
                f"{names[0]!r} and {name!r}; add it, or list the images in a CSV file"
            )
    return True


def _subfolders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
    return tuple(sorted(names))


def _are_numbers(names: tuple[str, ...]) -> bool:
    return set(names) == {str(label) for label in range(len(names))}


class _Row(NamedTuple):
    """A line of a table; ``where`` names it in messages."""

    where: str
    path: str
    label: str
    domain: str
    split: str


def _csv_rows(path: Path) -> list[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in _COLUMNS[:2] if name not in (reader.fieldnames or ())]
        if missing:
            raise VlkrError(
                f"{path} has no column {missing[0]!r}, expected a heading with path and label"
            )
        return [_row(f"{path}, line {reader.line_num}", values) for values in reader]


def _json_rows(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise VlkrError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise VlkrError(f"{where} holds {line[:40]}, expected an object")
        rows.append(_row(where, values))
    return rows


def _row(where: str, values: Mapping[str, Any]) -> _Row:
    texts: list[str] = []
    for name in _COLUMNS:
        value = values.get(name)
        is_number = name == "label" and isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, str | None) and not is_number:
            expected = "a name or an integer" if name == "label" else "a string"
            raise VlkrError(f"{where} has {name} {value!r}, expected {expected}")
        texts.append("" if value is None else str(value).strip())
        if not texts[-1] and name in ("path", "label"):
            raise VlkrError(f"{where} has no {name}")
    row = _Row(where, *texts)
    if row.split and row.split not in SPLITS:
        raise VlkrError(f"{where} has split {row.split!r}, expected {', '.join(SPLITS)}")
    return row


def _from_rows(path: Path, rows: list[_Row]) -> Listing:
    if not rows:
        raise VlkrError(f"{path} lists no image")
    for name in ("domain", "split"):
        filled = [bool(getattr(row, name)) for row in rows]
        if any(filled) and not all(filled):
            raise VlkrError(f"{rows[filled.index(False)].where} has no {name}, other lines have")
    labels = {row.label for row in rows}
    has_numbers = all(label.isascii() and label.isdecimal() for label in labels)
    classes = tuple(map(str, range(len(labels)))) if has_numbers else tuple(sorted(labels))
    if odd := sorted(labels - set(classes), key=int):
        raise VlkrError(
            f"{path} has label {odd[0]}, but the labels of {len(labels)} classes must be 0 to "
            f"{len(labels) - 1}"
        )
    index = {name: label for label, name in enumerate(classes)}
    files: dict[str, list[ImageFile]] = {}
    seen: dict[str, str] = {}
    for row in rows:
        _check_path(row.where, row.path)
        if row.path in seen:
            raise VlkrError(f"{row.where} lists {row.path!r} again, after {seen[row.path]}")
        seen[row.path] = row.where
        file = ImageFile(row.path, index[row.label], row.domain or None)
        files.setdefault(row.split, []).append(file)
    splits = {s: FileSource(path.parent, files[s]) for s in ("", *SPLITS) if s in files}
    domains = tuple(sorted({row.domain for row in rows if row.domain}))
    return Listing(classes, splits, domains, "numbers" if has_numbers else "names")


def _read_coop(path: Path) -> Listing:
    content = read_json(path)
    files: dict[str, list[ImageFile]] = {}
    names: dict[int, str] = {}
    for split, entries in content.items():
        if split not in SPLITS:
            raise VlkrError(f"{path} has split {split!r}, expected {', '.join(SPLITS)}")
        if not isinstance(entries, list) or not entries:
            raise VlkrError(f"{path}: split {split!r} is not a list of images")
        seen: set[str] = set()
        for i, entry in enumerate(entries):
            where = f"{path}, {split} image {i}"
            if not isinstance(entry, list) or [type(value) for value in entry] != [str, int, str]:
                raise VlkrError(f"{where} is {entry!r}, expected [path, label, class name]")
            name, label, class_name = entry
            _check_path(where, name)
            if name in seen:
                raise VlkrError(f"{where} lists {name!r} again")
            seen.add(name)
            if names.setdefault(label, class_name) != class_name:
                raise VlkrError(
                    f"{where} names label {label} {class_name!r}, which is {names[label]!r} before"
                )
            files.setdefault(split, []).append(ImageFile(name, label))
    if not files:
        raise VlkrError(f"{path} lists no image")
    if gaps := set(range(len(names))) - set(names):
        raise VlkrError(f"{path} has {len(names)} classes but none with label {min(gaps)}")
    classes = tuple(names[label] for label in range(len(names)))
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise VlkrError(f"{path} has two labels for class {twice!r}")
    root = _image_root(path, [part[0].path for part in files.values()])
    splits = {split: FileSource(root, files[split]) for split in SPLITS if split in files}
    return Listing(classes, splits, named_by="names")


def _image_root(path: Path, examples: list[str]) -> Path:
    beside = sorted(folder for folder in path.parent.iterdir() if folder.is_dir())
    for root in (path.parent, *beside):
        if all((root / example).is_file() for example in examples):
            return root
    raise VlkrError(
        f"no image {examples[0]!r} beside {path}, nor in one of the folders there; put the file "
        "where the folder of the images is"
    )


def _check_path(where: str, path: str) -> None:
    if not is_safe_path(path):
        raise VlkrError(f"{where} has path {path!r}, expected one that is relative and stays below")
