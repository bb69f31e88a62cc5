"""Classification dataset objects, such as torchvision's, as a source."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlkr.datasets.sources import Sample, Source, chunks, read_image
from vlkr.errors import SampleError, VlkrError

_PNG_MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "I;16")


@dataclass(frozen=True)
class TorchvisionSource:
    """A dataset that has a length and whose items are a PIL image and an integer.

    An item's key is its index. Where the dataset lists its files in ``samples``, as torchvision's
    ``DatasetFolder`` does, their bytes are given as they are; elsewhere an image is encoded without
    loss.

    Attributes:
        dataset: without a transform, as each model brings its own.
        num_classes: labels must lie below.
        indices: which of its items; None for all.

    Raises:
        VlkrError: if the dataset transforms its images.
    """

    dataset: Any
    num_classes: int
    indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if getattr(self.dataset, "transform", None) is not None:
            raise VlkrError(
                f"{_name(self.dataset)} has a transform; leave it out, each model brings its own"
            )

    def __iter__(self) -> Iterator[Sample]:
        return map(self._item, self._indices())

    def shards(self) -> Sequence[Source]:
        """At most 256 chunks of the indices."""
        return [replace(self, indices=chunk) for chunk in chunks(self._indices())]

    def _indices(self) -> Sequence[int]:
        return range(len(self.dataset)) if self.indices is None else self.indices

    def _lists_files(self) -> bool:
        samples = getattr(self.dataset, "samples", [])
        return len(samples) > 0 and isinstance(samples[0][0], (str, Path))

    def _item(self, index: int) -> Sample:
        key = f"{index:07d}"
        if self._lists_files():
            path, label = self.dataset.samples[index]
            image = read_image(Path(path), key)
            if getattr(self.dataset, "target_transform", None) is not None:
                label = self.dataset.target_transform(label)
        else:
            decoded, label = self.dataset[index]
            if not isinstance(decoded, Image.Image):
                kind = type(decoded).__name__
                raise VlkrError(
                    f"item {index} of {_name(self.dataset)} is a {kind}, expected a PIL image"
                )
            image = _encode(decoded)
        if not 0 <= int(label) < self.num_classes:
            raise SampleError(f"has label {label}, expected below {self.num_classes}", key=key)
        return Sample(key, image, int(label))


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    if image.mode in _PNG_MODES:
        image.save(buffer, "png", compress_level=1)
    else:
        image.save(buffer, "tiff")
    return buffer.getvalue()


def _name(dataset: Any) -> str:
    return f"dataset {type(dataset).__name__}"
