"""Splits as files, lists of keys that can be saved, shared and given back."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vlkr.datasets.samples import Sample
from vlkr.errors import VlkrError
from vlkr.files import read_json, write_text

_FORMAT = "vlkr split 1"
_PARTS = ("train", "val")
# RecursionError: of JSON nested too deeply; OverflowError: of an infinite label.
_MALFORMED = (ValueError, TypeError, LookupError, OverflowError, RecursionError)


@dataclass(frozen=True)
class FewShotSplit:
    """Training and validation samples, ordered by label, then domain, then hash.

    Attributes:
        train: a short class's samples are repeated.
        val: never one of those to train on.
        positions: by key, in the order of reading, if the images were more than memory may hold;
            then ``image`` is empty in every sample. None if the samples have their images.
    """

    train: list[Sample]
    val: list[Sample]
    positions: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Pick:
    """A sample as a split file names it.

    Attributes:
        key: of the sample; in other tools' files a path, of which the end counts.
        label: in the file's own numbering.
    """

    key: str
    label: int


@dataclass(frozen=True)
class SplitFile:
    """What a split file says.

    Attributes:
        path: of the file, for messages.
        picks: by part, ``"train"`` and ``"val"``; a sample may be repeated.
        class_names: by label, None in other tools' files, which may number the classes otherwise.
    """

    path: Path
    picks: Mapping[str, Sequence[Pick]]
    class_names: Sequence[str] | None


def write_split(
    path: Path, split: FewShotSplit, class_names: Sequence[str], header: Mapping[str, Any]
) -> None:
    """Writes a split as JSON Lines: a header, then a line a sample with key, label and part.

    Args:
        path: of the file.
        split: what was chosen.
        class_names: by label.
        header: how it was chosen: dataset, seed, shots.
    """
    first = {"format": _FORMAT, **header, "class_names": list(class_names)}
    lines = [json.dumps(first, ensure_ascii=False)]
    for part, samples in zip(_PARTS, (split.train, split.val), strict=True):
        for sample in samples:
            line = {"key": sample.key, "label": sample.label, "part": part}
            domain = {} if sample.domain is None else {"domain": sample.domain}
            lines.append(json.dumps(line | domain, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def read_split(path: Path) -> SplitFile:
    """Reads a split: JSON Lines as :func:`write_split` writes it, or JSON as CoOp and others do.

    CoOp's ``split_zhou_*.json``, which CLIP-LoRA and 2SFS read too, is ``{"train": [[path, label,
    classname], ...], "val": ...}``; mappings with ``impath`` (or ``path``) and ``label`` in place
    of the lists are read as well. A ``test`` part is not looked at.

    Raises:
        VlkrError: if the file is missing, a pickle, or not of such a form.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise VlkrError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix in (".pkl", ".pickle") or start[:1] == b"\x80":
        raise VlkrError(
            f"split file {path} is a pickle, which can run code when it is opened; give CoOp's "
            "split_zhou_*.json or the split.jsonl of a run"
        )
    return _read_foreign(path) if path.suffix == ".json" else _read_lines(path)


def _read_lines(path: Path) -> SplitFile:
    picks: dict[str, list[Pick]] = {part: [] for part in _PARTS}
    number = 1
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']!r}, expected {_FORMAT!r}")
            class_names = [str(name) for name in header["class_names"]]
            for line in file:
                number += 1
                entry = json.loads(line)
                picks[entry["part"]].append(Pick(str(entry["key"]), int(entry["label"])))
    except OSError as error:
        raise VlkrError(f"cannot read {path}: {error.strerror}") from error
    except _MALFORMED as error:
        reason = f"{type(error).__name__} {error}"
        raise VlkrError(f"{path}, line {number} is not a line of a split file: {reason}") from error
    return SplitFile(path, picks, class_names)


def _read_foreign(path: Path) -> SplitFile:
    value = read_json(path)
    if not isinstance(value.get("train"), list) or not isinstance(value.get("val") or [], list):
        raise VlkrError(f"{path} has no list 'train' or 'val', expected CoOp's form of a split")
    picks: dict[str, list[Pick]] = {}
    for part in _PARTS:
        picks[part] = []
        for entry in value.get(part) or []:
            try:
                if isinstance(entry, dict):
                    key = entry["impath"] if "impath" in entry else entry["path"]
                    entry = (key, entry["label"])
                picks[part].append(Pick(str(entry[0]), int(entry[1])))
            except _MALFORMED as error:
                raise VlkrError(
                    f"{path}: {str(entry)[:80]} in {part!r} is not a sample, expected "
                    "[path, label, classname]"
                ) from error
    return SplitFile(path, picks, None)


def take_split(
    samples: Iterable[Sample],
    file: SplitFile,
    class_names: Sequence[str],
    *,
    max_bytes: float | None = None,
) -> FewShotSplit:
    """Finds the samples of a split file, in one pass.

    Args:
        samples: that may be picked.
        file: what to pick, in this order.
        class_names: by label.
        max_bytes: of encoded images kept; beyond it the split is told without images.

    Raises:
        VlkrError: if a pick is not among the samples, fits several, or has another class.
    """
    if file.class_names is not None and list(file.class_names) != list(class_names):
        raise VlkrError(
            f"split file {file.path} is of {len(file.class_names)} classes, "
            f"{', '.join(file.class_names[:3])}, ...; the dataset has {len(class_names)}, "
            f"{', '.join(class_names[:3])}, ..."
        )
    finder = _Finder(file)
    found: dict[str, Sample] = {}
    positions: dict[str, int] = {}
    held, has_images = 0, True
    for position, sample in enumerate(samples):
        key = finder.find(sample)
        if key is None:
            continue
        if key in found:
            raise VlkrError(
                f"{key!r} of split file {file.path} fits two samples, {found[key].key!r} and "
                f"{sample.key!r}"
            )
        held += len(sample.image)
        if has_images and max_bytes is not None and held > max_bytes:
            has_images = False
            found = {key: replace(kept, image=b"") for key, kept in found.items()}
        found[key] = sample if has_images else replace(sample, image=b"")
        positions[sample.key] = position
    wanted = [pick.key for picks in file.picks.values() for pick in picks]
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise VlkrError(
            f"{len(missing)} of {len(set(wanted))} keys of split file {file.path} are not in the "
            f"dataset's train or val split, such as {missing[0]!r}"
        )
    train, val = ([found[pick.key] for pick in file.picks[part]] for part in _PARTS)
    if not train:
        raise VlkrError(f"split file {file.path} has no sample to train on")
    if both := {s.key for s in train} & {s.key for s in val}:
        raise VlkrError(
            f"split file {file.path} trains on and validates with {min(both)!r}: drop one"
        )
    return FewShotSplit(train, val, None if has_images else positions)


class _Finder:
    """Tells which pick a sample is: by key, and in other tools' files by the end of a path."""

    def __init__(self, file: SplitFile) -> None:
        self.file = file
        self.labels: dict[str, int] = {}
        self.by_name: dict[str, set[str]] = defaultdict(set)
        # Another tool's label of each of ours, and the other way round.
        self.ours: dict[int, int] = {}
        self.theirs: dict[int, int] = {}
        for picks in file.picks.values():
            for pick in picks:
                if self.labels.setdefault(pick.key, pick.label) != pick.label:
                    raise VlkrError(f"split file {file.path} has two labels for {pick.key!r}")
                self.by_name[PurePosixPath(pick.key).name].add(pick.key)

    def find(self, sample: Sample) -> str | None:
        key: str | None = sample.key if sample.key in self.labels else None
        if key is None and self.file.class_names is None:
            near = [
                pick
                for pick in self.by_name.get(PurePosixPath(sample.key).name, ())
                if sample.key.endswith(f"/{pick}") or pick.endswith(f"/{sample.key}")
            ]
            if len(near) > 1:
                raise VlkrError(
                    f"sample {sample.key!r} fits several of split file {self.file.path}: "
                    f"{', '.join(sorted(near)[:3])}"
                )
            key = near[0] if near else None
        if key is None:
            return None
        label = self.labels[key]
        renumbered = self.file.class_names is None and (
            self.ours.setdefault(label, sample.label) == sample.label
            and self.theirs.setdefault(sample.label, label) == label
        )
        if label != sample.label and not renumbered:
            raise VlkrError(
                f"{key!r} has label {label} in split file {self.file.path}, but the dataset's "
                f"label {sample.label}"
            )
        return key
