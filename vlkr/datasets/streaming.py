"""Batches of more images than memory holds: true epochs, shuffled while they are read."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Dataset

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
from vlkr.datasets.samples import BadSample, Sample, Source, good_samples, unit_hash
from vlkr.errors import VlkrError

_LANES = 8
"""Streams that an epoch's batches are taken from in turn; so many workers share the reading."""
_OPEN = 2
"""Shards that a lane reads at once."""


@dataclass(frozen=True)
class EpochPlan:
    """Which samples an epoch's batches hold, before one is read.

    Batches are numbered over all processes: step ``i`` of a process is batch ``i * world_size +
    rank``. Their sizes differ by 1 at most, every sample is in one batch, and neither this nor the
    order depends on the number of workers.

    Attributes:
        counts: samples in each shard.
        batch_size: samples a step, on one process, at most.
        min_steps: least number of steps an epoch; few samples are passed over several times.
        world_size: number of processes.
        seed: of the order.
        buffer: samples from which the next one is drawn.
    """

    counts: Sequence[int]
    batch_size: int
    min_steps: int
    world_size: int
    seed: int
    buffer: int

    def __post_init__(self) -> None:
        if sum(self.counts) < self.world_size:
            raise VlkrError(
                f"{sum(self.counts)} training images cannot be shared by {self.world_size} "
                "processes"
            )

    @property
    def num_samples(self) -> int:
        """Of an epoch, over all processes: all, or as many as fill ``min_steps`` whole batches."""
        samples, step = sum(self.counts), self.batch_size * self.world_size
        return samples if -(-samples // step) >= self.min_steps else self.min_steps * step

    @property
    def steps(self) -> int:
        """Batches of an epoch on each process."""
        step = self.batch_size * self.world_size
        # A batch is never empty: with batches of 1 the odd samples go into batches of 2.
        return min(-(-self.num_samples // step), self.num_samples // self.world_size)

    @property
    def lanes(self) -> int:
        """A power of 2, no more than there are shards."""
        most = max(1, min(_LANES, sum(count > 0 for count in self.counts)))
        return 1 << (most.bit_length() - 1)

    def size(self, batch: int) -> int:
        """Samples in a batch."""
        small, large = self._sizes()
        return small + (batch < large)

    def _sizes(self) -> tuple[int, int]:
        """Samples in a small batch, and how many batches, the first ones, have one more."""
        return divmod(self.num_samples, self.steps * self.world_size)

    def segments(self, epoch: int, lane: int) -> list[tuple[int, int, int]]:
        """What a lane reads in an epoch: shards, each from one sample up to another."""
        small, large = self._sizes()
        batches = range(self.steps * self.world_size)
        sizes = [
            small * len(batches[i :: self.lanes]) + len(batches[i : large : self.lanes])
            for i in range(self.lanes)
        ]
        start = sum(sizes[:lane])
        stop = start + sizes[lane]
        found: list[tuple[int, int, int]] = []
        position = 0
        for shard in self._order(epoch):
            first, last = max(start - position, 0), min(stop - position, self.counts[shard])
            if first < last:
                found.append((shard, first, last))
            position += self.counts[shard]
        return found

    def _order(self, epoch: int) -> Iterator[int]:
        """Shards, shuffled anew for each pass; the last pass may be cut short."""
        for number in range(-(-self.num_samples // sum(self.counts))):
            yield from sorted(
                range(len(self.counts)),
                key=lambda shard: unit_hash(f"{epoch}/{number}/{shard}", self.seed),
            )


class StreamedBatches(Dataset[Batch]):
    """The batches of a stream by epoch and number.

    A worker keeps the lanes that it was asked for open and reads on; a batch that lies behind or
    in another epoch makes it start the lane anew, so that any order of asking gives the same
    batches, and asking in order reads each shard once.

    Args:
        source: of the training samples, all of them.
        plan: of its epochs.
        transform: of 8-bit tensors, or of PIL images.
        bad: told of samples that cannot be decoded.
    """

    def __init__(
        self,
        source: Source,
        plan: EpochPlan,
        transform: TrainTransform | Transform,
        bad: BadSamples,
    ) -> None:
        self.shards = source.shards()
        self.plan = plan
        self.transform = transform
        self.bad = bad
        self.epoch = -1
        self.lanes: dict[int, _Lane] = {}

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch, batch = item
        if epoch != self.epoch:
            self.epoch, self.lanes = epoch, {}
        number = batch % self.plan.lanes
        lane = self.lanes.get(number)
        if lane is None or lane.next_batch > batch:
            lane = self.lanes[number] = _Lane(self.shards, self.plan, epoch, number)
        return collate([self._item(sample, epoch, batch) for sample in lane.take(batch)])

    def _item(self, sample: Sample, epoch: int, batch: int) -> Item | None:
        image = decode_image(sample)
        if isinstance(image, BadSample):
            self.bad.add(image)
            return None
        # The batch counts, for an epoch of several passes meets a sample again.
        seed = int(unit_hash(f"{epoch}/{batch}/{sample.key}", self.plan.seed) * 2**62)
        return transformed(sample, to_tensor(image), self.transform, seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "epoch": -1, "lanes": {}}


class _Lane:
    """One of an epoch's streams, a shuffle buffer over several shards that are read at once."""

    def __init__(self, shards: Sequence[Source], plan: EpochPlan, epoch: int, number: int) -> None:
        self.plan = plan
        self.next_batch = number
        self.generator = random.Random(f"{plan.seed}/{epoch}/{number}")
        segments = plan.segments(epoch, number)
        self.samples = self._shuffled(
            _segment(shards[shard], shard, first, last) for shard, first, last in segments
        )

    def take(self, batch: int) -> list[Sample]:
        """The samples of a batch that is the next one or lies ahead."""
        samples: list[Sample] = []
        while self.next_batch <= batch:
            samples = list(islice(self.samples, self.plan.size(self.next_batch)))
            self.next_batch += self.plan.lanes
        return samples

    def _shuffled(self, segments: Iterator[Iterator[Sample]]) -> Iterator[Sample]:
        size = max(1, self.plan.buffer // self.plan.lanes)
        buffer: list[Sample] = []
        for sample in self._interleaved(segments):
            buffer.append(sample)
            if len(buffer) == size:
                yield self._draw(buffer)
        while buffer:
            yield self._draw(buffer)

    def _interleaved(self, segments: Iterator[Iterator[Sample]]) -> Iterator[Sample]:
        reading = list(islice(segments, _OPEN))
        while reading:
            chosen = int(self.generator.random() * len(reading))
            sample = next(reading[chosen], None)
            if sample is not None:
                yield sample
            else:
                reading[chosen : chosen + 1] = islice(segments, 1)

    def _draw(self, buffer: list[Sample]) -> Sample:
        chosen = int(self.generator.random() * len(buffer))
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        return buffer.pop()


def _segment(shard: Source, number: int, first: int, last: int) -> Iterator[Sample]:
    """The samples of a shard from ``first`` up to ``last``.

    What the source itself refuses was counted when its samples were.

    Raises:
        VlkrError: if there are fewer.
    """
    position = first
    for sample in islice(good_samples(shard), first, last):
        yield sample
        position += 1
    if position < last:
        raise VlkrError(
            f"shard {number} of the training images ends after {position} samples, {last} were "
            "there before: the data changed"
        )
