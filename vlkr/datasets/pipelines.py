"""From encoded samples to batches of tensors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import v2

from vlkr.datasets.sources import Sample, Source
from vlkr.errors import VlkrError

Transform = Callable[[Image.Image], Tensor]


class Batch(NamedTuple):
    """What the model is fed.

    Attributes:
        images: ``(batch, 3, height, width)``.
        labels: ``(batch)``, int64.
        keys: of the samples.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]


def decode_image(sample: Sample) -> Image.Image:
    """Decodes to RGB.

    Raises:
        VlkrError: naming the sample, if its bytes are no whole image.
    """
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except UnidentifiedImageError as error:
        raise VlkrError(f"sample {sample.key!r} is no image in a format that is known") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VlkrError(f"sample {sample.key!r} is a corrupt image: {error}") from error


def train_transform(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    crop_scale: tuple[float, float],
    flip: bool,
) -> Transform:
    """Random resized crop, flip if asked, and the model's own normalisation.

    Args:
        size: height and width in pixels.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
        interpolation: ``"bicubic"``, ``"bilinear"``, ... as open_clip names it.
        crop_scale: smallest and largest area of the crop, relative to the image.
        flip: flip half of the images horizontally.
    """
    mode = v2.InterpolationMode.BICUBIC if interpolation == "random" else interpolation
    steps: list[Any] = [
        v2.RandomResizedCrop(
            size, scale=crop_scale, interpolation=v2.InterpolationMode(mode), antialias=True
        )
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    transform: Transform = v2.Compose(steps)
    return transform


class FewShotImages(Dataset[tuple[Tensor, int, str]]):
    """Few samples in memory, decoded once; an item is an index and the seed of its augmentation."""

    def __init__(self, samples: Sequence[Sample], transform: Transform) -> None:
        self.images = [decode_image(sample) for sample in samples]
        self.labels = [sample.label for sample in samples]
        self.keys = [sample.key for sample in samples]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, str]:
        index, seed = item
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(self.images[index]), self.labels[index], self.keys[index]


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
        self.steps = max(min_steps, -(-num_samples // (batch_size * world_size)))
        self.local_size = self.steps * batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.local_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        total = self.local_size * self.world_size
        permutations = (torch.randperm(self.num_samples, generator=generator) for _ in repeat(None))
        order = list(islice(chain.from_iterable(p.tolist() for p in permutations), total))
        seeds = torch.randint(2**62, (total,), generator=generator).tolist()
        return iter(list(zip(order, seeds, strict=True))[self.rank :: self.world_size])


class SampleStream(IterableDataset[tuple[Tensor, int, str]]):
    """A split as a stream of tensors, shared out among a loader's workers without loss."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __iter__(self) -> Iterator[tuple[Tensor, int, str]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for sample in islice(self.source, first, None, step):
            yield self.transform(decode_image(sample)), sample.label, sample.key


def collate(items: list[tuple[Tensor, int, str]]) -> Batch:
    """Stacks items into a :class:`Batch`."""
    images, labels, keys = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), list(keys))


def evaluation_loader(
    source: Source, transform: Transform, batch_size: int, num_workers: int
) -> DataLoader[Batch]:
    """Batches of every sample of ``source``, each exactly once."""
    return DataLoader[Any](
        SampleStream(source, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
    )
