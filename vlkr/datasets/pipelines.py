"""From encoded samples to batches of tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, repeat
from multiprocessing import Array, Value
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    default_collate,
    get_worker_info,
)

from vlkr.datasets.images import decode_image as decode_image
from vlkr.datasets.samples import BadSample, Sample, Source, good_samples, worker_shard
from vlkr.datasets.transforms import (
    PixelTransform,
    TrainTransform,
    Transform,
    seeded,
    to_tensor,
    without_normalization,
)
from vlkr.errors import VlkrError
from vlkr.runtime import rank, without_traceback, world_size


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


class FewShotImages(Dataset[Item | None]):
    """Few samples in memory, decoded once; an item is an index and the seed of its augmentation.

    Args:
        samples: with their encoded images.
        transform: of 8-bit tensors to train, or of PIL images.
        max_bytes: of decoded images; more are kept encoded and decoded at each use.
        bad: told of samples that cannot be decoded. They are left out, or None as items if they
            are found later.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Transform | TrainTransform,
        max_bytes: float = float("inf"),
        bad: BadSamples | None = None,
    ) -> None:
        self.transform = transform
        self.bad = bad or BadSamples()
        self.samples: list[Sample] = []
        self.images: list[Tensor] | None = []
        decoded: dict[str, Tensor | None] = {}  # a repeated sample is kept once
        self.nbytes = 0
        for sample in samples:
            if sample.key not in decoded:
                image = decoded[sample.key] = self._decode(sample)
                self.nbytes += 0 if image is None else image.nbytes
            if self.nbytes > max_bytes:
                self.samples, self.images = list(samples), None
                self.nbytes = sum(len(sample.image) for sample in samples)
                return
            if (image := decoded[sample.key]) is not None:
                self.samples.append(replace(sample, image=b""))
                self.images.append(image)

    @property
    def keys(self) -> list[str]:
        """Of the samples, in order."""
        return [sample.key for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> Item | None:
        index, seed = item
        sample = self.samples[index]
        image = self._decode(sample) if self.images is None else self.images[index]
        return None if image is None else transformed(sample, image, self.transform, seed)

    def _decode(self, sample: Sample) -> Tensor | None:
        image = decode_image(sample)
        if isinstance(image, BadSample):
            self.bad.add(image)
            return None
        return to_tensor(image)


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


class EpochSampler(Sampler[tuple[int, int]]):
    """Order and augmentation seeds as a function of seed and epoch; oversamples to whole batches.

    An epoch runs through as many permutations as it needs to fill ``steps`` batches.

    Args:
        num_samples: in the dataset.
        batch_size: samples a step, on one process.
        min_steps: least number of steps an epoch.
        seed: of the whole run.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        min_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.steps = max(min_steps, -(-num_samples // (batch_size * world_size)))
        self.local_size = self.steps * batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        """Batches of the epoch that are left out, for they were seen before a checkpoint."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.start = self.start if epoch == self.epoch else 0
        self.epoch = epoch

    def __len__(self) -> int:
        return self.local_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        total = self.local_size * self.world_size
        permutations = (torch.randperm(self.num_samples, generator=generator) for _ in repeat(None))
        order = list(islice(chain.from_iterable(p.tolist() for p in permutations), total))
        seeds = torch.randint(2**62, (total,), generator=generator).tolist()
        own = list(zip(order, seeds, strict=True))[self.rank :: self.world_size]
        return iter(own[self.start * self.batch_size :])


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
