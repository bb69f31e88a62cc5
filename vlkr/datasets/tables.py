"""Lists of images in a file: CoOp's splits, CSV and JSON Lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlkr.datasets.folders import SPLITS, Listing
from vlkr.datasets.samples import FileSource, ImageFile, is_safe_path
from vlkr.errors import VlkrError
from vlkr.files import read_json

TABLES = (".json", ".csv", ".jsonl")
_COLUMNS = ("path", "label", "domain", "split")


class _Row(NamedTuple):
    where: str
    path: str
    label: str
    domain: str
    split: str


def read_table(path: Path) -> Listing:
    """Reads a list of images, told by its suffix.

    - ``.json`` is CoOp's ``split_zhou_*.json``: ``[path, label, class name]`` by split. The images
      lie beside it or in one of the folders beside it.
    - ``.csv`` has a heading, ``.jsonl`` an object a line, with ``path`` (relative to the file),
      ``label`` (a class's name or number) and, if wanted, ``domain`` and ``split`` (train, val or
      test).

    Raises:
        VlkrError: for a file that cannot be read; a path that is absolute, leads out of the folder
            or is listed twice; labels that are not 0 to n - 1, or do not go with one name each; a
            column that only some lines fill.
    """
    try:
        if path.suffix == ".json":
            return _from_coop(path)
        return _from_rows(path, _csv_rows(path) if path.suffix == ".csv" else _json_rows(path))
    except OSError as error:
        raise VlkrError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, RecursionError, csv.Error) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error


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
            expected = "a name or an integer" if name == "label" else "a text"
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
    are_numbers = all(label.isascii() and label.isdecimal() for label in labels)
    if are_numbers:
        classes = tuple(map(str, range(len(labels))))
        if odd := sorted(labels - set(classes), key=int):
            raise VlkrError(
                f"{path} has label {odd[0]} but not each from 0 on: {len(labels)} classes are "
                f"numbered 0 to {len(labels) - 1}"
            )
    else:
        classes = tuple(sorted(labels))
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
    order = [split for split in ("", *SPLITS) if split in files]
    splits = {split: FileSource(path.parent, files[split]) for split in order}
    domains = tuple(sorted({row.domain for row in rows if row.domain}))
    return Listing(classes, splits, domains, "numbers" if are_numbers else "names")


def _from_coop(path: Path) -> Listing:
    content = read_json(path)
    files: dict[str, list[ImageFile]] = {}
    names: dict[int, str] = {}
    for split in content:
        if split not in SPLITS:
            raise VlkrError(f"{path} has split {split!r}, expected {', '.join(SPLITS)}")
        if not isinstance(content[split], list) or not content[split]:
            raise VlkrError(f"{path}: split {split!r} is no list of images")
    for split in (split for split in SPLITS if split in content):
        files[split] = []
        seen: set[str] = set()
        for i, entry in enumerate(content[split]):
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
            files[split].append(ImageFile(name, label))
    if not files:
        raise VlkrError(f"{path} lists no image")
    if gaps := set(range(len(names))) - set(names):
        raise VlkrError(f"{path} has {len(names)} classes but none with label {min(gaps)}")
    classes = tuple(names[label] for label in range(len(names)))
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise VlkrError(f"{path} has two labels for class {twice!r}")
    root = _image_root(path, [part[0].path for part in files.values()])
    splits = {split: FileSource(root, part) for split, part in files.items()}
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
