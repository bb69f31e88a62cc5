"""Samples, what gives them, and the plainest source: a list of files."""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from vlkr.errors import SampleError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
MAX_BYTES = 2**28
"""An encoded image of more bytes (256 MiB) is refused before it is read."""

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Sample:
    """An image that is not decoded yet.

    Attributes:
        key: unique in its split and the same wherever the data is read.
        image: the encoded bytes.
        label: index into the class names.
        domain: where the image comes from, such as ``"sketch"``, if the data tells.
        shard: the tar that holds it, for messages.
    """

    key: str
    image: bytes
    label: int
    domain: str | None = None
    shard: str | None = field(default=None, compare=False)


@runtime_checkable
class Source(Protocol):
    """A split of a dataset. Each iteration gives all samples, in the same order.

    ``next`` raises :class:`SampleError` for a sample that cannot be used, and can then be called
    again: it goes on behind that sample (:func:`skip_bad`).
    """

    def __iter__(self) -> Iterator[Sample]: ...

    def shards(self) -> Sequence[Source]:
        """Parts, in order, that can be read independently: tars, or chunks of a list of files."""
        ...


def skip_bad(
    samples: Iterable[Sample], on_error: Callable[[SampleError], None]
) -> Iterator[Sample]:
    """The samples that can be used; ``on_error`` is called with the error of each other one."""
    iterator = iter(samples)
    while True:
        try:
            sample = next(iterator)
        except StopIteration:
            return
        except SampleError as error:
            on_error(error)
            continue
        yield sample


@dataclass(frozen=True)
class DomainSource:
    """The samples of some domains.

    Attributes:
        source: of all domains.
        domains: whose samples are kept.
    """

    source: Source
    domains: Collection[str]

    def __iter__(self) -> Iterator[Sample]:
        return filter(lambda sample: sample.domain in self.domains, self.source)

    def shards(self) -> Sequence[Source]:
        """Those of the source, filtered; some may be empty."""
        return [DomainSource(shard, self.domains) for shard in self.source.shards()]


class ImageFile(NamedTuple):
    """A file of a :class:`FileSource`: its path below the root, which is its key, and its label."""

    path: str
    label: int
    domain: str | None = None


@dataclass(frozen=True)
class FileSource:
    """A list of image files.

    Attributes:
        root: their paths are relative to it.
        files: in the order of reading.
    """

    root: Path
    files: Sequence[ImageFile]

    def __iter__(self) -> Iterator[Sample]:
        return map(self._read, self.files)

    def shards(self) -> Sequence[Source]:
        """At most 256 chunks of the list, whose lengths differ by 1 at most."""
        return [replace(self, files=chunk) for chunk in chunks(self.files)]

    def only(self, domains: Collection[str]) -> FileSource:
        """The files of some domains."""
        return replace(self, files=[file for file in self.files if file.domain in domains])

    def relabelled(self, labels: Mapping[int, int]) -> FileSource:
        """The same files; label ``i`` becomes ``labels[i]``."""
        return replace(self, files=[file._replace(label=labels[file.label]) for file in self.files])

    def held_out(self, fraction: float) -> tuple[FileSource, FileSource]:
        """The files without, and those in, the ``fraction`` that a hash of the key chooses."""
        parts: tuple[list[ImageFile], list[ImageFile]] = ([], [])
        for file in self.files:
            parts[unit_hash(file.path) < fraction].append(file)
        return replace(self, files=parts[0]), replace(self, files=parts[1])

    def _read(self, file: ImageFile) -> Sample:
        image = read_image(self.root / file.path, file.path)
        return Sample(file.path, image, file.label, file.domain)


def read_image(path: Path, key: str) -> bytes:
    """The bytes of an image file.

    Raises:
        SampleError: if it cannot be read, is no regular file, or is larger than ``MAX_BYTES``.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SampleError("is not a file", key=key)
        if status.st_size > MAX_BYTES:
            raise SampleError(too_large(status.st_size), key=key)
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"cannot be read from {path}: {error.strerror}", key=key) from error


def is_safe_path(path: str) -> bool:
    """Whether a relative path names something below the folder it is relative to."""
    parts = path.replace("\\", "/").split("/")
    return bool(path) and parts[0] != "" and ".." not in parts and "\0" not in path


def too_large(size: int) -> str:
    """What is wrong with an encoded image of ``size`` bytes."""
    return f"has {size:,} bytes, more than the {MAX_BYTES:,} allowed"


def chunks(items: Sequence[T]) -> list[Sequence[T]]:
    """At most 256 consecutive parts whose lengths differ by 1 at most."""
    count = min(len(items), 256)
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]


def unit_hash(key: str, seed: int | None = None) -> float:
    """A number in [0, 1) that depends on the key (and the seed) and on nothing else."""
    text = key if seed is None else f"{seed}:{key}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
