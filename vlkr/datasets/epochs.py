"""The training batches of an epoch, of images in memory or of a stream, in an order by seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice, repeat

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vlkr.datasets.images import decode_image
from vlkr.datasets.loading import (
    BadSamples,
    Batch,
    Item,
    TrainTransform,
    Transform,
    collate,
    to_tensor,
    transformed,
)
from vlkr.datasets.samples import BadSample, Sample
from vlkr.datasets.streaming import EpochPlan, StreamedBatches
from vlkr.errors import VlkrError
from vlkr.runtime import without_traceback


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


@dataclass(frozen=True)
class MemoryPlan:
    """The order and the augmentation seeds of an epoch of images in memory.

    They are a function of seed and epoch alone. An epoch runs through as many permutations as it
    needs to fill whole batches. Batches are numbered as those of an :class:`EpochPlan`.

    Attributes:
        num_samples: in memory.
        batch_size: samples per step, on one process.
        min_steps: least number of steps per epoch.
        world_size: number of processes.
        seed: of the whole run.
    """

    num_samples: int
    batch_size: int
    min_steps: int
    world_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Batches of an epoch on each process."""
        return max(self.min_steps, -(-self.num_samples // (self.batch_size * self.world_size)))

    def items(self, epoch: int, batch: int) -> list[tuple[int, int]]:
        """Returns the index and the augmentation seed of each sample of a batch."""
        step, rank = divmod(batch, self.world_size)
        size = self.batch_size * self.world_size  # over all processes, which take turns
        order = _permutations(self.num_samples, self.steps * size, self.seed, epoch)
        return order[step * size + rank : (step + 1) * size : self.world_size]


@lru_cache(maxsize=1)
def _permutations(num_samples: int, total: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    permutations = (torch.randperm(num_samples, generator=generator) for _ in repeat(None))
    order = list(islice(chain.from_iterable(p.tolist() for p in permutations), total))
    return list(
        zip(order, torch.randint(2**62, (total,), generator=generator).tolist(), strict=True)
    )


class MemoryBatches(Dataset[Batch]):
    """The batches of images in memory by epoch and number."""

    def __init__(self, images: FewShotImages, plan: MemoryPlan) -> None:
        self.images = images
        self.plan = plan

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        return collate([self.images[own] for own in self.plan.items(*item)])


class EpochSampler(Sampler[tuple[int, int]]):
    """Epoch and number of each batch of this process, in order.

    Args:
        plan: of the epochs.
        rank: of this process.
    """

    def __init__(self, plan: EpochPlan | MemoryPlan, rank: int = 0) -> None:
        self.steps = plan.steps
        self.rank = rank
        self.world_size = plan.world_size
        self.epoch = 0
        self.start = 0
        """Batches of the epoch that are left out because they were seen before a checkpoint."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.start = self.start if epoch == self.epoch else 0
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        batches = range(self.start, self.steps)
        return ((self.epoch, i * self.world_size + self.rank) for i in batches)


class TrainLoader(DataLoader[Batch]):
    """A data loader whose epochs depend on seed and number alone, and that resumes in mid-epoch.

    ``state_dict`` and ``load_state_dict`` are those that Lightning's checkpoints call.

    Args:
        batches: by epoch and number.
        rank: of this process.
        bad: counts samples that are skipped; warns at the end of an epoch.
        num_workers: processes that decode and augment; 0 does it in this one.
    """

    def __init__(
        self,
        batches: MemoryBatches | StreamedBatches,
        rank: int,
        bad: BadSamples,
        num_workers: int = 0,
    ) -> None:
        self.order = EpochSampler(batches.plan, rank)
        super().__init__(
            batches,
            sampler=self.order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        self.bad = bad
        self.done = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator starts with the first batch: by then Lightning has set the epoch.
        self.done = self.order.start
        for batch in without_traceback(super().__iter__()):
            self.done += 1
            yield batch
        self.order.start = 0
        self.bad.warn()

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch, and how many of its batches were given out."""
        return {
            "epoch": self.order.epoch,
            "batch": self.done,
            "batches": self.order.steps,
            "world_size": self.order.world_size,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Resumes after the batches that were given out.

        Raises:
            VlkrError: if the epoch was of another length, or of other processes.
        """
        own = self.state_dict()
        for name, what in (("batches", "batches per epoch"), ("world_size", "processes")):
            if state[name] != own[name]:
                raise VlkrError(
                    f"cannot resume in mid-epoch: the checkpoint is of {state[name]} {what}, this "
                    f"run of {own[name]}"
                )
        self.order.epoch, self.order.start = state["epoch"], state["batch"]
