"""Samples, and the sources that they are read from.

A sample that cannot be used is a value in the stream, a :class:`BadSample`, so that the samples
after it can still be read. Whatever ends a stream early is raised.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from PIL import Image

from vlkr.errors import VlkrError, printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
MAX_BYTES = 2**28
"""An encoded image of more bytes (256 MiB) is refused before it is read."""

_PNG_MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "I;16")

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Sample:
    """An image that is not decoded yet.

    Attributes:
        key: unique in its split and the same wherever the data is read.
        image: the encoded bytes.
        label: index into the class names.
        domain: where the image comes from, such as ``"sketch"``, if known.
        shard: the tar that holds it, for messages.
    """

    key: str
    image: bytes
    label: int
    domain: str | None = None
    shard: str | None = field(default=None, compare=False)

    def bad(self, reason: str) -> BadSample:
        """This sample, which cannot be used for ``reason``."""
        return BadSample(reason, self.key, self.shard)


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used; ``str`` gives one line that names it.

    Attributes:
        reason: what is wrong, as a predicate: ``"has no label"``.
        key: of the sample.
        shard: the tar that holds it, None for a file of its own.
    """

    reason: str
    key: str | None = None
    shard: str | None = None

    def __str__(self) -> str:
        names = (self.shard, None if self.key is None else f"sample {self.key!r}")
        where = ", ".join(name for name in names if name)
        return printable(f"{where} {self.reason}" if where else self.reason)


class Source(Protocol):
    """A split of a dataset. Each iteration gives all samples, in the same order."""

    def __iter__(self) -> Iterator[Sample | BadSample]: ...

    def shards(self) -> Sequence[Source]:
        """Parts, in order, that can be read independently: tars, or chunks of a list of files."""
        ...


def good_samples(
    samples: Iterable[Sample | BadSample], on_bad: Callable[[BadSample], object] = lambda bad: None
) -> Iterator[Sample]:
    """The samples that can be used; ``on_bad`` is called with each of the others."""
    for sample in samples:
        if isinstance(sample, BadSample):
            on_bad(sample)
        else:
            yield sample


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

    def __iter__(self) -> Iterator[Sample | BadSample]:
        for path, label, domain in self.files:
            image = read_image(self.root / path, path)
            yield image if isinstance(image, BadSample) else Sample(path, image, label, domain)

    def shards(self) -> Sequence[Source]:
        """At most 256 chunks of the list, whose lengths differ by 1 at most."""
        return [replace(self, files=chunk) for chunk in chunks(self.files)]


@dataclass(frozen=True)
class TorchvisionSource:
    """A dataset that has a length and whose items are a PIL image and an integer.

    An item's key is its index. Where the dataset lists its files in ``samples``, as torchvision's
    ``DatasetFolder`` does, their bytes are given as they are; otherwise images are encoded without
    loss.

    Attributes:
        dataset: without a transform, as each model brings its own.
        num_classes: labels must be smaller.
        indices: which of its items; None for all.

    Raises:
        VlkrError: if the dataset transforms its images.
    """

    dataset: Any
    num_classes: int
    indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if getattr(self.dataset, "transform", None) is not None:
            name = type(self.dataset).__name__
            raise VlkrError(
                f"dataset {name} has a transform; leave it out, each model brings its own"
            )

    def __iter__(self) -> Iterator[Sample | BadSample]:
        return map(self._item, self.item_indices())

    def shards(self) -> Sequence[Source]:
        """At most 256 chunks of the indices."""
        return [replace(self, indices=chunk) for chunk in chunks(self.item_indices())]

    def item_indices(self) -> Sequence[int]:
        """The indices of all of its items, in the order of reading."""
        return range(len(self.dataset)) if self.indices is None else self.indices

    def _item(self, index: int) -> Sample | BadSample:
        key = f"{index:07d}"
        files = getattr(self.dataset, "samples", [])
        if len(files) > 0 and isinstance(files[0][0], (str, Path)):
            path, label = files[index]
            image = read_image(Path(path), key)
            if isinstance(image, BadSample):
                return image
            if getattr(self.dataset, "target_transform", None) is not None:
                label = self.dataset.target_transform(label)
        else:
            decoded, label = self.dataset[index]
            if not isinstance(decoded, Image.Image):
                raise VlkrError(
                    f"item {index} of dataset {type(self.dataset).__name__} is a "
                    f"{type(decoded).__name__}, expected a PIL image"
                )
            image = _encode(decoded)
        if not 0 <= int(label) < self.num_classes:
            return BadSample(f"has label {label}, expected below {self.num_classes}", key)
        return Sample(key, image, int(label))


@dataclass(frozen=True)
class View:
    """Some samples of a source, and all of its bad ones.

    Attributes:
        source: of all samples.
        domains: whose samples are kept; None keeps all.
        labels: consecutive labels that are kept and renumbered from 0; None keeps all.
        times: how often each key is given, in a row, the other keys not at all; None gives all
            once.
    """

    source: Source
    domains: Collection[str] | None = None
    labels: range | None = None
    times: Mapping[str, int] | None = None

    def __iter__(self) -> Iterator[Sample | BadSample]:
        for sample in self.source:
            if isinstance(sample, BadSample):
                yield sample
                continue
            if self.domains is not None and sample.domain not in self.domains:
                continue
            if self.labels is not None:
                if sample.label not in self.labels:
                    continue
                sample = replace(sample, label=sample.label - self.labels.start)
            yield from repeat(sample, 1 if self.times is None else self.times.get(sample.key, 0))

    def shards(self) -> Sequence[Source]:
        """Views of the source's shards; some may be empty."""
        return [replace(self, source=shard) for shard in self.source.shards()]


@dataclass(frozen=True)
class Joined:
    """Several sources, one after the other."""

    sources: Sequence[Source]

    def __iter__(self) -> Iterator[Sample | BadSample]:
        return chain.from_iterable(self.sources)

    def shards(self) -> Sequence[Source]:
        """The shards of each source."""
        return [shard for source in self.sources for shard in source.shards()]


def shuffled_by_hash(source: Source, seed: int | None = None) -> Source:
    """The same samples, in an order that mixes the classes where the source is a list.

    Folders and tables come class by class; sorted by a hash of their keys, consecutive samples are
    of any class. Shards keep their order.
    """
    if isinstance(source, FileSource):
        files = sorted(source.files, key=lambda file: unit_hash(file.path, seed))
        return replace(source, files=files)
    if isinstance(source, TorchvisionSource):
        indices = sorted(source.item_indices(), key=lambda index: unit_hash(str(index), seed))
        return replace(source, indices=indices)
    if isinstance(source, View):
        return replace(source, source=shuffled_by_hash(source.source, seed))
    return source


def worker_shard(source: Source, index: int, count: int) -> Iterator[Sample | BadSample]:
    """The ``index``-th of ``count`` parts of a source; each sample is in one part.

    Whole shards are dealt out as long as every part gets one; of the remaining shards each part
    takes every ``count``-th sample, which means reading them whole.
    """
    shards = source.shards()
    whole = len(shards) - len(shards) % count
    remaining = chain.from_iterable(shards[whole:])
    return chain(
        chain.from_iterable(shards[index:whole:count]), islice(remaining, index, None, count)
    )


def read_image(path: Path, key: str) -> bytes | BadSample:
    """The bytes of a regular file of at most ``MAX_BYTES`` bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return BadSample("is not a file", key)
        if status.st_size > MAX_BYTES:
            reason = f"has {status.st_size:,} bytes, more than the {MAX_BYTES:,} allowed"
            return BadSample(reason, key)
        return path.read_bytes()
    except OSError as error:
        return BadSample(f"cannot be read from {path}: {error.strerror}", key)


def is_safe_path(path: str) -> bool:
    """Whether a relative path names something below the folder it is relative to."""
    parts = path.replace("\\", "/").split("/")
    return bool(path) and parts[0] != "" and ".." not in parts and "\0" not in path


def chunks(items: Sequence[T]) -> list[Sequence[T]]:
    """At most 256 consecutive parts whose lengths differ by 1 at most."""
    count = min(len(items), 256)
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]


def unit_hash(key: str, seed: int | None = None) -> float:
    """A number in [0, 1) that depends on the key (and the seed) and on nothing else."""
    text = key if seed is None else f"{seed}:{key}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    if image.mode in _PNG_MODES:
        image.save(buffer, "png", compress_level=1)
    else:
        image.save(buffer, "tiff")
    return buffer.getvalue()
