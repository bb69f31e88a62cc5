"""webdataset shards that nobody vouches for, in CLIP_benchmark's layout."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

from vlkr.datasets.images import check_format
from vlkr.datasets.roots import Root
from vlkr.datasets.samples import (
    IMAGE_EXTENSIONS,
    MAX_BYTES,
    BadSample,
    Sample,
    Source,
    is_safe_path,
)
from vlkr.errors import VlkrError

if TYPE_CHECKING:
    from typing import Self

_READ = {*IMAGE_EXTENSIONS, "cls", "json"}
_MAX_TEXT = 2**20
# RecursionError: headers that each announce another one.
_DAMAGED = (OSError, tarfile.TarError, ValueError, IndexError, RecursionError)
_AHEAD = 32
_AHEAD_BYTES = 2**22
_OCTAL = re.compile(rb"[0-7]+")
# A key that is a tar member's name as it stands: webdataset cuts names at the first dot.
_SAFE_KEY = re.compile(r"[\w-]+(?:/[\w-]+)*", re.ASCII)
_MAX_KEY = 80
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass
class _Record:
    """The members of a tar that share a key, as far as they are read."""

    shard: str
    key: str
    fields: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class ShardSource:
    """Tars in webdataset's form: files of one key in a row make a sample.

    A sample is an image (``.jpg``, ``.png``, ...; the first of ``IMAGE_EXTENSIONS`` counts) and its
    label, an integer in ``.cls`` or as ``label`` in ``.json``, which may also tell its ``domain``,
    and its ``key`` where that is not fit for the name of a file. Other fields are passed over and
    never decoded, ``.pkl``, ``.pyd`` and ``.npy`` among them.

    A sample is bad if its image or label is missing or too large, the label is
    out of range, the domain is not one of ``domains``, or its key or one of its fields came before;
    across tars that is seen when one process reads them all, and in any case at the end of an
    evaluation. The whole shard is refused if it is truncated, damaged, compressed, lacks its end
    mark or has something behind that; or if it holds links, devices, sparse files, or names that
    are absolute or have ``..``.

    Attributes:
        root: where the tars lie.
        names: their paths below it.
        num_classes: labels must lie below.
        domains: that samples may name; none takes any.
    """

    root: Root
    names: Sequence[str]
    num_classes: int
    domains: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Sample | BadSample]:
        records = chain.from_iterable(map(self._records, self.names))
        return map(partial(self._sample, _Keys()), records)

    def shards(self) -> Sequence[Source]:
        """One a tar."""
        return [replace(self, names=[name]) for name in self.names]

    def _records(self, name: str) -> Iterator[_Record]:
        shard = self.root.where(name)
        with self.root.open(name) as stream:
            try:
                yield from _ahead(_read_records(shard, stream))
            except _DAMAGED as error:
                self.root.forget(name)
                if isinstance(error, VlkrError):
                    raise
                raise VlkrError(f"cannot read shard {shard}: {error}") from error

    def _sample(self, seen: _Keys, record: _Record) -> Sample | BadSample:
        key = record.key
        try:
            if record.problem:
                raise ValueError(record.problem)
            image, label, facts = _parse(record.fields)
            key = facts.get("key", key)
            domain = facts.get("domain")
            if not seen.add(key):
                raise ValueError("comes a second time")
            if label >= self.num_classes:
                raise ValueError(f"has label {label}, expected below {self.num_classes}")
            if self.domains and domain not in self.domains:
                expected = ", ".join(self.domains)
                raise ValueError(f"has domain {domain!r}, expected one of {expected}")
        except ValueError as error:
            return BadSample(str(error), key, record.shard)
        return Sample(key, image, label, domain, record.shard)


class _Keys:
    """A set of keys in 16 to 32 bytes each, however long they are: a table of their hashes.

    Of ``n`` keys two that differ are taken for one with a probability of ``n^2 / 2^65``, which is
    3e-8 for a million. Python draws the hash anew in each process, so nobody can aim at that.
    """

    def __init__(self) -> None:
        self._slots = array("q", bytes(8 * 64))
        self._count = 0

    def add(self, key: str) -> bool:
        """Adds a key; False if it is there already."""
        value = hash(key) or 1  # an empty slot holds 0
        slots = self._slots
        last = len(slots) - 1
        place = value & last
        while found := slots[place]:
            if found == value:
                return False
            place = (place + 1) & last
        slots[place] = value
        self._count += 1
        if 2 * self._count > last:
            self._grow()
        return True

    def _grow(self) -> None:
        slots = array("q", bytes(16 * len(self._slots)))
        last = len(slots) - 1
        for value in filter(None, self._slots):
            place = value & last
            while slots[place]:
                place = (place + 1) & last
            slots[place] = value
        self._slots = slots


def _ahead(records: Iterator[_Record]) -> Iterator[_Record]:
    """Reads a few records at a time.

    Between two images that are decoded the reader's own code and data would leave the processor's
    caches each time; so reading costs half as much.
    """
    waiting: list[_Record] = []
    size = 0
    failure: Exception | None = None
    try:
        for record in records:
            waiting.append(record)
            size += sum(map(len, record.fields.values()))
            if len(waiting) == _AHEAD or size > _AHEAD_BYTES:
                yield from waiting
                waiting, size = [], 0
    except Exception as error:  # what was read before comes first
        failure = error
    yield from waiting
    if failure:
        raise failure


class _PlainInfo(tarfile.TarInfo):
    """Name and size of a plain file, and nothing else, which takes half the time of the whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Leaves to tarfile what is no plain file with a short name, or is damaged."""
        size, checksum = buf[124:135], buf[148:154]
        is_plain = (
            len(buf) == tarfile.BLOCKSIZE
            and buf[156:157] == tarfile.REGTYPE
            and not buf[345]  # no prefix before the name
            and _OCTAL.fullmatch(size)
            and _OCTAL.fullmatch(checksum)
            and buf[135] in b"\0 "
            and int(checksum, 8) == sum(buf) - sum(buf[148:156]) + 8 * ord(" ")
        )
        if not is_plain:
            return super().frombuf(buf, encoding, errors)
        name, _, _ = buf[:100].partition(b"\0")
        info = cls(name.decode(encoding, errors))
        info.size = int(size, 8)
        return info


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
    limit = MAX_BYTES if extension in IMAGE_EXTENSIONS else _MAX_TEXT
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
    while block := stream.read(_MAX_TEXT):
        if any(block):
            raise VlkrError(f"cannot read shard {shard}: there is something behind its end mark")


def _parse(fields: Mapping[str, bytes]) -> tuple[bytes, int, dict[str, Any]]:
    """Image, label, and what ``.json`` tells.

    Raises:
        ValueError: what is wrong, as a predicate.
    """
    image = next((fields[e] for e in IMAGE_EXTENSIONS if e in fields), None)
    if image is None:
        raise ValueError(f"has no image, expected one of .{' .'.join(IMAGE_EXTENSIONS)}")
    try:
        facts = json.loads(fields["json"]) if "json" in fields else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has .json that is not valid: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError("has .json that is no object")
    for name in ("key", "domain"):
        if not isinstance(facts.get(name, ""), str):
            raise ValueError(f"has {name} {facts[name]!r} in .json, expected a text")
    labels = [fields["cls"].strip().decode("ascii", "replace")] if "cls" in fields else []
    labels += [str(facts["label"])] if "label" in facts else []
    if not labels:
        raise ValueError("has no label, expected .cls with an integer")
    if not (labels[0].isdecimal() and len(labels[0]) < 10):
        raise ValueError(f"has label {labels[0][:20]!r}, expected .cls with an integer")
    if labels[0] != labels[-1]:
        raise ValueError(f"has label {labels[0]} in .cls and {labels[-1][:20]} in .json")
    return image, int(labels[0]), facts


def tar_fields(sample: Sample) -> list[tuple[str, bytes]] | BadSample:
    """Names and contents of a sample's files in a tar.

    A key that webdataset would cut at a dot goes into ``.json``, and a hash of it into the name.
    """
    extension = check_format(sample)
    if isinstance(extension, BadSample):
        return extension
    is_safe = len(sample.key) <= _MAX_KEY and _SAFE_KEY.fullmatch(sample.key)
    name = sample.key if is_safe else "s" + hashlib.sha256(sample.key.encode()).hexdigest()[:20]
    about = {} if is_safe else {"key": sample.key}
    about |= {} if sample.domain is None else {"domain": sample.domain}
    fields = [(f"{name}.{extension}", sample.image), (f"{name}.cls", str(sample.label).encode())]
    return fields + ([(f"{name}.json", json.dumps(about).encode())] if about else [])
