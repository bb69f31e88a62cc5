"""Untrusted webdataset shards in CLIP_benchmark's layout."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from vlkr.caching import MissingError
from vlkr.datasets.images import check_format
from vlkr.datasets.lists import SPLITS
from vlkr.datasets.remote import LocalRoot, Root
from vlkr.datasets.samples import (
    IMAGE_EXTENSIONS,
    MAX_BYTES,
    BadSample,
    Sample,
    Source,
    is_safe_path,
)
from vlkr.errors import VlkrError

_READ = {*IMAGE_EXTENSIONS, "cls", "json"}
_MAX_FIELD = 2**20
_MAX_TEXT = 2**22
_MAX_SHARDS = 10**6
# RecursionError: headers that each announce another one.
_DAMAGED = (OSError, tarfile.TarError, ValueError, IndexError, RecursionError)
# Mode, owner, group, size, time and checksum of a header as tar programs write them.
_NUMBERS = re.compile(rb"(?:[0-7]{7}\0){3}[0-7]{11}[ \0][0-7]{11}[ \0][0-7]{6}[ \0]{2}")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
# A key that is a tar member's name as it stands: webdataset cuts names at the first dot.
_SAFE_KEY = re.compile(r"[\w-]+(?:/[\w-]+)*", re.ASCII)
_MAX_KEY = 80


@dataclass(frozen=True)
class Layout:
    """What is known of a dataset from its files alone.

    Attributes:
        class_names: by label.
        splits: sources by split.
        templates: prompts with ``{c}``; none where the data has none.
        domains: names that the samples use; none where the data has none.
        sizes: images per split, where ``vlkr data pack`` has counted them.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, Source]
    templates: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


def holds_shards(folder: Path) -> bool:
    """Whether a folder has CLIP_benchmark's layout."""
    return (folder / "classnames.txt").is_file() or any(
        next((folder / split).glob("*.tar"), None) for split in SPLITS
    )


def read_layout(root: Root, class_names: Sequence[str] | None = None) -> Layout:
    """Reads the files beside the shards, and no shard.

    Args:
        root: of the layout: ``classnames.txt``, ``zeroshot_classification_templates.txt``, and
            ``<split>/nshards.txt`` beside ``<split>/{0..n-1}.tar``; from ``vlkr data pack`` also
            ``domains.txt`` and ``manifest.json``.
        class_names: in place of those at the root.

    Raises:
        VlkrError: if a file cannot be read, there is no split or no class name, or the number of
            class names differs from those given.
    """
    own = _lines(root, "classnames.txt")
    names = tuple(class_names or own)
    if not names:
        raise VlkrError(f"no class names in {root.where('classnames.txt')}, expected one per line")
    if own and len(own) != len(names):
        raise VlkrError(
            f"{root.where('classnames.txt')} has {len(own)} classes, the card {len(names)}"
        )
    domains = _lines(root, "domains.txt")
    splits: dict[str, Source] = {}
    for split in SPLITS:
        with suppress(MissingError):
            splits[split] = ShardSource(root, shard_names(root, split), len(names), domains)
    if not splits:
        raise VlkrError(
            f"no split in {root.where('')}, expected {', '.join(SPLITS)} with nshards.txt and 0.tar"
        )
    templates = tuple(filter(None, _lines(root, "zeroshot_classification_templates.txt")))
    sizes: dict[str, int] = {}
    try:
        manifest = json.loads(_read_text(root, "manifest.json"))
        sizes = {split: int(manifest["splits"][split]["samples"]) for split in splits}
    except MissingError:
        pass
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise VlkrError(f"{root.where('manifest.json')} is not valid: {error!r}") from error
    return Layout(names, splits, templates, domains, sizes)


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


def _lines(root: Root, path: str) -> tuple[str, ...]:
    """The lines of a text file, none if it is missing; empty ones at the end do not count.

    In between they do: CLIP_benchmark has a dataset whose fourth class has no name.
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


def tar_fields(sample: Sample) -> list[tuple[str, bytes]] | BadSample:
    """Names and contents of a sample's files in a tar.

    A key that webdataset would cut at a dot goes into ``.json``, and a hash of it into the name.
    """
    extension = check_format(sample)
    if isinstance(extension, BadSample):
        return extension
    is_safe = len(sample.key) <= _MAX_KEY and _SAFE_KEY.fullmatch(sample.key)
    name = sample.key if is_safe else "s" + hashlib.sha256(sample.key.encode()).hexdigest()[:20]
    facts = {} if is_safe else {"key": sample.key}
    facts |= {} if sample.domain is None else {"domain": sample.domain}
    fields = [(f"{name}.{extension}", sample.image), (f"{name}.cls", str(sample.label).encode())]
    return fields + ([(f"{name}.json", json.dumps(facts).encode())] if facts else [])


@dataclass(frozen=True)
class ShardSource:
    """Tars in webdataset's form: consecutive files with one key make a sample.

    A sample is an image (``.jpg``, ``.png``, ...; the first of ``IMAGE_EXTENSIONS`` counts) and its
    label, an integer in ``.cls`` or as ``label`` in ``.json``, which may also give its ``domain``,
    and its ``key`` where that is not fit for the name of a file. Other fields are skipped and
    never decoded, ``.pkl``, ``.pyd`` and ``.npy`` among them.

    A sample is bad if its image or label is missing or too large, the label is out of range, the
    domain is not one of ``domains``, or its key or one of its fields came before; across tars that
    is seen when one process reads them all, and in any case at the end of an evaluation. The whole
    shard is refused if it is truncated, damaged, compressed, lacks its end mark or has something
    after that; or if it holds links, devices, sparse files, or names that are absolute or have
    ``..``.

    Attributes:
        root: of the tars.
        names: their paths below it.
        num_classes: labels must be smaller.
        domains: that samples may name; none takes any.
    """

    root: Root
    names: Sequence[str]
    num_classes: int
    domains: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Sample | BadSample]:
        keys = _Keys()
        for name in self.names:
            shard = self.root.where(name)
            with self.root.open(name) as stream:
                try:
                    for record in _read_records(shard, stream):
                        yield self._sample(record, keys)
                except _DAMAGED as error:
                    self.root.forget(name)
                    if isinstance(error, VlkrError):
                        raise
                    raise VlkrError(f"cannot read shard {shard}: {error}") from error

    def shards(self) -> Sequence[Source]:
        """One per tar."""
        return [replace(self, names=[name]) for name in self.names]

    def _sample(self, record: _Record, keys: _Keys) -> Sample | BadSample:
        key = record.key
        try:
            if record.problem:
                raise ValueError(record.problem)
            image, label, facts = _parse(record.fields)
            key = facts.get("key", key)
            domain = facts.get("domain")
            if not keys.add(key):
                raise ValueError("comes a second time")
            if label >= self.num_classes:
                raise ValueError(f"has label {label}, expected below {self.num_classes}")
            if self.domains and domain not in self.domains:
                expected = ", ".join(self.domains)
                raise ValueError(f"has domain {domain!r}, expected one of {expected}")
        except ValueError as error:
            return BadSample(str(error), key, record.shard)
        return Sample(key, image, label, domain, record.shard)


@dataclass
class _Record:
    """The members of a tar that share a key, as far as they are read."""

    shard: str
    key: str
    fields: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None


class _Keys:
    """A set of keys by their 8-byte hashes, which takes about 20 bytes per key.

    Of ``n`` keys two that differ are taken for one with a probability of ``n^2 / 2^65``, which is
    3e-8 for a million. Python draws the hash anew in each process, so it cannot be attacked.
    """

    def __init__(self) -> None:
        self._sorted: NDArray[np.int64] = np.empty(0, np.int64)
        self._recent: set[int] = set()

    def add(self, key: str) -> bool:
        """Adds a key; False if it is in the set already."""
        value = hash(key)
        place = self._sorted.searchsorted(value)
        is_known = place < len(self._sorted) and self._sorted[place] == value
        if is_known or value in self._recent:
            return False
        self._recent.add(value)
        if len(self._recent) > max(2**16, len(self._sorted) // 8):
            recent = np.fromiter(self._recent, np.int64)
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort()
            self._recent = set()
        return True


class _PlainInfo(tarfile.TarInfo):
    """Name and size of a plain file alone, which takes half the time of the whole header."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Leaves to tarfile what is not a plain file with a short name, or is damaged."""
        is_plain = (
            len(buf) == tarfile.BLOCKSIZE
            and buf[156:157] == tarfile.REGTYPE
            and not buf[345]  # no prefix before the name
            and _NUMBERS.fullmatch(buf, 100, 156)
            and int(buf[148:154], 8) == sum(buf) - sum(buf[148:156]) + 8 * ord(" ")
        )
        if not is_plain:
            return super().frombuf(buf, encoding, errors)
        name, _, _ = buf[:100].partition(b"\0")
        info = cls(name.decode(encoding, errors))
        info.size = int(buf[124:135], 8)
        return info


# webdataset's own tar_file_iterator opens compressed tars, skips members that are not files, and
# takes a cut at a header for the end.
def _read_records(shard: str, stream: BinaryIO) -> Iterator[_Record]:
    from webdataset.tariterators import base_plus_ext  # which imports torch

    if stream.read(6).startswith(_COMPRESSED):
        raise VlkrError(f"shard {shard} is compressed, expected a plain tar")
    stream.seek(0)
    record: _Record | None = None
    with tarfile.open(fileobj=stream, mode="r:", errors="strict", tarinfo=_PlainInfo) as archive:
        for member in _plain_files(shard, archive):
            key, extension = base_plus_ext(member.name)
            if key is None or key.startswith("__"):
                continue  # as webdataset does
            if record is None or record.key != key:
                if record:
                    yield record
                record = _Record(shard, key)
            _add(record, extension.lower(), member, stream)
        stream.seek(archive.offset)
        _check_end(shard, stream)
    if record:
        yield record


def _plain_files(shard: str, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    offset = -1
    while member := archive.next():
        archive.members = []  # type: ignore[attr-defined]  # or it keeps every header
        name = member.name
        if member.size < 0 or archive.offset <= offset:
            raise VlkrError(f"cannot read shard {shard}: the size of {name!r} is damaged")
        offset = archive.offset
        if not is_safe_path(name):
            raise VlkrError(f"shard {shard} holds {name!r}, a path that leads out of it")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise VlkrError(f"shard {shard} holds {name!r}, which is not a plain file")
        yield member


def _add(record: _Record, extension: str, member: tarfile.TarInfo, stream: BinaryIO) -> None:
    if extension not in _READ:
        return
    if extension in record.fields:
        record.problem = f"has two fields .{extension}"
    limit = MAX_BYTES if extension in IMAGE_EXTENSIONS else _MAX_FIELD
    if member.size > limit:
        record.problem = f"has {member.size:,} bytes in .{extension}, more than {limit:,}"
        return
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    record.fields[extension] = content


def _check_end(shard: str, stream: BinaryIO) -> None:
    # tarfile takes a damaged header, and the end of a file that is cut there, for the end.
    mark = stream.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE or any(mark):
        raise VlkrError(f"cannot read shard {shard}: it is cut or damaged, it has no end mark")
    while block := stream.read(_MAX_FIELD):
        if any(block):
            raise VlkrError(f"cannot read shard {shard}: there is something after its end mark")


def _parse(fields: Mapping[str, bytes]) -> tuple[bytes, int, dict[str, Any]]:
    """Image, label, and the content of ``.json``; a ValueError says what is wrong."""
    image = next((fields[e] for e in IMAGE_EXTENSIONS if e in fields), None)
    if image is None:
        raise ValueError(f"has no image, expected one of .{' .'.join(IMAGE_EXTENSIONS)}")
    try:
        facts = json.loads(fields["json"]) if "json" in fields else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has .json that is not valid: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError("has .json that is not an object")
    for name in ("key", "domain"):
        if not isinstance(facts.get(name, ""), str):
            raise ValueError(f"has {name} {facts[name]!r} in .json, expected a string")
    labels = [fields["cls"].strip().decode("ascii", "replace")] if "cls" in fields else []
    labels += [str(facts["label"])] if "label" in facts else []
    if not labels:
        raise ValueError("has no label, expected .cls with an integer")
    if not (labels[0].isdecimal() and len(labels[0]) < 10):
        raise ValueError(f"has label {labels[0][:20]!r}, expected .cls with an integer")
    if labels[0] != labels[-1]:
        raise ValueError(f"has label {labels[0]} in .cls and {labels[-1][:20]} in .json")
    return image, int(labels[0]), facts
