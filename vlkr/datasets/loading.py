"""From encoded samples to batches of tensors: transforms, collation, evaluation loaders."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import Array, Value
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torchvision import transforms
from torchvision.transforms import v2

from vlkr.datasets.images import decode_image
from vlkr.datasets.samples import BadSample, Sample, Source, good_samples, worker_shard
from vlkr.errors import VlkrError
from vlkr.runtime import rank, without_traceback, world_size

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip if asked, and the model's own normalisation.

    Cropping works on 8-bit tensors, where torchvision resizes several times as fast as Pillow;
    normalisation is left to the batch, on whichever device it lies.

    Attributes:
        size: height and width in pixels.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
        interpolation: ``"bicubic"``, ``"bilinear"``, ... as open_clip names it.
        crop_scale: smallest and largest area of the crop, relative to the image.
        flip: flip half of the images horizontally.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_scale: tuple[float, float]
    flip: bool

    @cached_property
    def _augment(self) -> v2.Compose:
        name = "bicubic" if self.interpolation == "random" else self.interpolation
        mode = v2.InterpolationMode(name)
        crop = v2.RandomResizedCrop(
            self.size, scale=self.crop_scale, interpolation=mode, antialias=True
        )
        return v2.Compose([crop, v2.RandomHorizontalFlip()] if self.flip else [crop])

    def __call__(self, image: Tensor) -> Tensor:
        """A random crop ``(3, *size)`` of an image ``(3, height, width)``, both uint8."""
        cropped: Tensor = self._augment(image)
        return cropped

    def normalize(self, images: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` in uint8 as the model wants it, in fp32."""
        return _normalized(images, self.mean, self.std)


@dataclass(frozen=True)
class PixelTransform:
    """A model's own transform up to 8-bit pixels; normalisation is left to the batch.

    Attributes:
        head: PIL image to PIL image of mode RGB and the model's size.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
    """

    head: transforms.Compose
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels ``(3, height, width)`` in uint8."""
        return to_tensor(self.head(image))

    def normalize(self, images: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` in uint8 as the model's own transform has it, to the bit.

        Float images, of a transform that is not split, are left as they are.
        """
        return _normalized(images, self.mean, self.std)


def without_normalization(transform: Transform) -> Transform | PixelTransform:
    """A transform that ends in ``ToTensor`` and ``Normalize``, as open_clip's and timm's, split.

    Workers then hand over a quarter of the bytes, and normalising is one operation for a batch, on
    the model's device. Other transforms are left as they are.
    """
    steps = transform.transforms if isinstance(transform, transforms.Compose) else []
    if len(steps) < 2 or not (
        isinstance(steps[-2], transforms.ToTensor) and isinstance(steps[-1], transforms.Normalize)
    ):
        return transform
    mean, std = (torch.as_tensor(values).tolist() for values in (steps[-1].mean, steps[-1].std))
    return PixelTransform(transforms.Compose(steps[:-2]), mean, std)


def _normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if images.dtype != torch.uint8:
        return images
    # Two passes: converting and laying out anew in one is several times as slow.
    scaled = images.float().contiguous().div_(255)
    normalized: Tensor = v2.functional.normalize(scaled, list(mean), list(std), inplace=True)
    return normalized


def to_tensor(image: Image.Image) -> Tensor:
    """``(3, height, width)`` in uint8, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block torch's CPU generator starts from ``seed``; elsewhere it goes on."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Batch(NamedTuple):
    """What the model is fed.

    Attributes:
        images: ``(batch, 3, height, width)``; uint8 until they are normalised.
        labels: ``(batch)``, int64.
        keys: of the samples.
        domains: of the samples, None where the data does not tell.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]
    domains: list[str | None]


class Item(NamedTuple):
    """One image of a :class:`Batch`."""

    image: Tensor
    label: int
    key: str
    domain: str | None = None


class BadSamples:
    """Counts the samples that cannot be used, over all workers of a loader.

    Args:
        max_bad: how many are skipped; one more is an error.
    """

    def __init__(self, max_bad: int = 0) -> None:
        self.max_bad = max_bad
        self._count = Value("q", 0)
        self._first: Any = Array("c", 500)

    def add(self, bad: BadSample) -> None:
        """Counts one.

        Raises:
            VlkrError: if these are more than ``max_bad``.
        """
        with self._count.get_lock():
            self._count.value += 1
            count = self._count.value
        if count == 1:
            self._first.value = str(bad).encode()[:500]
        if count > self.max_bad:
            if self.max_bad == 0:
                raise VlkrError(f"{bad}; max_bad lets such samples be skipped")
            raise VlkrError(f"more than {self.max_bad} bad samples; the last: {bad}")

    def warn(self) -> None:
        """Tells how many were skipped, if any, and starts anew."""
        count = self._count.value
        if count:
            plural = "s were" if count > 1 else " was"
            first = self._first.value.decode(errors="replace")
            warnings.warn(f"{count} bad sample{plural} skipped; the first: {first}", stacklevel=2)
        self._count.value = 0


def transformed(
    sample: Sample, image: Tensor, transform: Transform | TrainTransform, seed: int
) -> Item:
    """An item of a decoded image ``(3, height, width)``, augmented as ``seed`` tells."""
    with seeded(seed):
        tensor = (
            transform(image)
            if isinstance(transform, TrainTransform)
            else transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        )
    return Item(tensor, sample.label, sample.key, sample.domain)


def collate(items: Sequence[Item | None]) -> Batch:
    """Stacks items into a :class:`Batch`.

    The place of a bad sample, None, is taken by others of the batch, so that the batches of an
    epoch keep their number and sizes on every process.

    Raises:
        VlkrError: if all are bad.
    """
    good = [item for item in items if item is not None]
    if not good:
        raise VlkrError(f"each of the {len(items)} samples of a batch is bad")
    filled = [item if item is not None else good[i % len(good)] for i, item in enumerate(items)]
    images, labels, keys, domains = zip(*(Item(*item) for item in filled), strict=True)
    return Batch(_stack(images), torch.tensor(labels), list(keys), list(domains))


def _stack(images: Sequence[Tensor]) -> Tensor:
    """``(batch, 3, height, width)``, laid out in memory as each image is."""
    is_channels_last = images[0].permute(1, 2, 0).is_contiguous()
    parts = [image.permute(1, 2, 0) if is_channels_last else image for image in images]
    # torch's own collation stacks straight into shared memory in a worker.
    stacked: Tensor = default_collate(parts)
    return stacked.permute(0, 3, 1, 2) if is_channels_last else stacked


class SampleStream(IterableDataset[Item]):
    """A split as a stream of tensors, each sample once over all processes and workers."""

    def __init__(self, source: Source, transform: Transform, bad: BadSamples) -> None:
        self.source = source
        self.transform = without_normalization(transform)
        self.bad = bad
        self.place = rank(), world_size()

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        place, processes = self.place
        workers = worker.num_workers if worker else 1
        index = place * workers + (worker.id if worker else 0)
        samples = worker_shard(self.source, index, processes * workers)
        for sample in good_samples(samples, self.bad.add):
            image = decode_image(sample)
            if isinstance(image, BadSample):
                self.bad.add(image)
                continue
            yield Item(self.transform(image), sample.label, sample.key, sample.domain)


class EvaluationLoader(DataLoader[Batch]):
    """Batches of a split's samples, not normalised; tells of bad ones at its end."""

    def __init__(self, stream: SampleStream, batch_size: int, num_workers: int) -> None:
        super().__init__(
            stream,  # type: ignore[arg-type]
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate,
        )
        self.stream = stream
        self.bad = stream.bad

    def normalize(self, images: Tensor) -> Tensor:
        """Images of a batch, on any device, as the transform has them; float images stay so."""
        transform = self.stream.transform
        return transform.normalize(images) if isinstance(transform, PixelTransform) else images

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from without_traceback(super().__iter__())
        self.bad.warn()


def evaluation_loader(
    source: Source,
    transform: Transform,
    batch_size: int,
    num_workers: int,
    *,
    max_bad: int = 0,
) -> EvaluationLoader:
    """Batches of every sample of ``source``, each exactly once.

    Images are 8-bit where the transform ends as open_clip's and timm's do; the loader's
    ``normalize`` makes them what the transform gives, to the bit. Where torch.distributed is up,
    each process has its share, without padding.

    Args:
        source: of the samples.
        transform: PIL image to tensor.
        batch_size: images at a time.
        num_workers: processes that decode images; 0 does it in this one.
        max_bad: samples that cannot be used are skipped and counted, up to so many.

    Raises:
        VlkrError: while iterating, for more than ``max_bad`` bad samples.
    """
    return EvaluationLoader(
        SampleStream(source, transform, BadSamples(max_bad)), batch_size, num_workers
    )
