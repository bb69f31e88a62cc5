"""Where samples come from: a folder of images per class, or webdataset shards."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from webdataset.tariterators import group_by_keys, tar_file_expander

from vlkr.errors import VlkrError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")


@dataclass(frozen=True, order=True)
class Sample:
    """An image that is not decoded yet.

    Attributes:
        key: unique in its split and the same wherever the data is read.
        image: the encoded bytes.
        label: index into the class names.
    """

    key: str
    image: bytes
    label: int


class Source(Protocol):
    """A split of a dataset. Each iteration gives all samples, in the same order."""

    def __iter__(self) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class ShardSource:
    """webdataset shards in CLIP_benchmark's layout, ``<split>/{0..n-1}.tar``.

    A sample is an image and its label in ``.cls``.

    Only image and label bytes are looked at; nothing in a shard is ever unpickled.

    Attributes:
        folder: of one split.
        num_classes: labels must lie below.
    """

    folder: Path
    num_classes: int

    def urls(self) -> list[str]:
        """Paths of the shards.

        Raises:
            VlkrError: if there are none, or one that ``nshards.txt`` counts is missing.
        """
        count_file = self.folder / "nshards.txt"
        if not count_file.is_file():
            shards = sorted(self.folder.glob("*.tar"))
            if not shards:
                raise VlkrError(f"no shards in {self.folder}, expected nshards.txt and 0.tar")
            return [str(path) for path in shards]
        text = count_file.read_text().strip()
        if not text.isdigit() or int(text) < 1:
            raise VlkrError(f"{count_file} holds {text!r}, expected the number of shards")
        shards = [self.folder / f"{i}.tar" for i in range(int(text))]
        for shard in shards:
            if not shard.is_file():
                raise VlkrError(f"shard {shard} is missing, {count_file} counts {text}")
        return [str(path) for path in shards]

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.urls():
            try:
                with Path(shard).open("rb") as stream:
                    files = tar_file_expander([{"url": shard, "stream": stream}])
                    yield from map(self._sample, group_by_keys(files))
            except VlkrError:
                raise
            except (OSError, tarfile.TarError, ValueError, EOFError, IndexError) as error:
                # webdataset appends the stream to the reason.
                reason = str(error.args[0] if error.args else error).partition(" @ <")[0]
                raise VlkrError(f"cannot read shard {shard}: {reason}") from error

    def _sample(self, raw: dict[str, bytes | str]) -> Sample:
        key = str(raw["__key__"])
        where = f"{raw['__url__']!s}, sample {key!r}"
        image = next((raw[e] for e in IMAGE_EXTENSIONS if e in raw), None)
        label = raw.get("cls")
        if not isinstance(image, bytes):
            raise VlkrError(f"{where}: no image, expected one of .{' .'.join(IMAGE_EXTENSIONS)}")
        if not isinstance(label, bytes) or not label.strip().isdigit():
            raise VlkrError(f"{where}: label {label!r}, expected .cls with an integer")
        if int(label) >= self.num_classes:
            raise VlkrError(f"{where}: label {int(label)}, expected below {self.num_classes}")
        return Sample(key, image, int(label))


@dataclass(frozen=True)
class FolderSource:
    """Images in one folder per class.

    Attributes:
        root: holds the class folders.
        classes: their names, in the order of the labels.
        held_out: None for every image; else the part of them that is read: those that a hash of
            the key puts into the last ``fraction`` (``test``), or the others.
        fraction: of the images that are held out.
    """

    root: Path
    classes: tuple[str, ...]
    held_out: bool | None = None
    fraction: float = 0.0

    def __iter__(self) -> Iterator[Sample]:
        for label, name in enumerate(self.classes):
            paths = image_files(self.root / name)
            if not paths:
                raise VlkrError(f"class {name!r} is empty: no image in {self.root / name}")
            for path in paths:
                key = path.relative_to(self.root).as_posix()
                if self.held_out is None or self.held_out == (unit_hash(key) < self.fraction):
                    try:
                        yield Sample(key, path.read_bytes(), label)
                    except OSError as error:
                        raise VlkrError(f"cannot read {path}: {error.strerror}") from error


def image_files(folder: Path) -> list[Path]:
    """Image files at any depth below ``folder`` that are not hidden, sorted by name."""
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in suffixes and p.name[0] != "." and p.is_file()
    )


def unit_hash(key: str, seed: int | None = None) -> float:
    """A number in [0, 1) that depends on the key (and the seed) and on nothing else."""
    text = key if seed is None else f"{seed}:{key}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
