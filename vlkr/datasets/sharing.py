"""A source shared out among processes and workers, each sample to one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vlkr.datasets.sources import FileSource, Sample, Source, unit_hash
from vlkr.datasets.torchvision import TorchvisionSource
from vlkr.errors import SampleError


def mixed(source: Source, seed: int | None = None) -> Source:
    """The same samples, in an order that mixes the classes where the source is a list.

    Folders and tables come class by class; sorted by a hash of their keys, consecutive samples are
    of any class. Shards keep their order.
    """
    changes: dict[str, Any] = {}
    if isinstance(source, FileSource):
        changes["files"] = sorted(source.files, key=lambda file: unit_hash(file.path, seed))
    elif isinstance(source, TorchvisionSource):
        indices = range(len(source.dataset)) if source.indices is None else source.indices
        changes["indices"] = sorted(indices, key=lambda index: unit_hash(str(index), seed))
    elif isinstance(inner := getattr(source, "source", None), Source):
        changes["source"] = mixed(inner, seed)
    return dataclasses.replace(source, **changes) if changes else source  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True)
class JoinedSource:
    """Several sources, one behind the other."""

    sources: Sequence[Source]

    def __iter__(self) -> Iterator[Sample]:
        return _Chained([iter(source) for source in self.sources])

    def shards(self) -> Sequence[Source]:
        """Those of each."""
        return [shard for source in self.sources for shard in source.shards()]


def process_place() -> tuple[int, int]:
    """Rank of this process and number of processes, 0 and 1 where torch.distributed is not up."""
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def shared_out(source: Source, index: int, count: int) -> Iterable[Sample]:
    """The ``index``-th of ``count`` shares of a source; each sample is in one share.

    As many whole shards as go round are dealt out; of the others each share takes every
    ``count``-th sample, which means reading them whole.
    """
    shards = source.shards()
    whole = len(shards) - len(shards) % count
    iterators = [iter(shard) for shard in shards[index:whole:count]]
    rest = _Chained([iter(shard) for shard in shards[whole:]])
    return _Chained([*iterators, _Every(rest, index, count)])


class _Chained(Iterator[Sample]):
    """``itertools.chain`` that goes on behind an error."""

    def __init__(self, iterators: list[Iterator[Sample]]) -> None:
        self.iterators = iterators[::-1]

    def __next__(self) -> Sample:
        while self.iterators:
            try:
                return next(self.iterators[-1])
            except StopIteration:
                self.iterators.pop()
        raise StopIteration


class _Every(Iterator[Sample]):
    """``itertools.islice(samples, index, None, count)`` that goes on behind an error.

    An error counts as a sample, so that one share alone meets it.
    """

    def __init__(self, samples: Iterator[Sample], index: int, count: int) -> None:
        self.samples, self.index, self.count, self.position = samples, index, count, 0

    def __next__(self) -> Sample:
        while True:
            mine = self.position % self.count == self.index
            try:
                sample = next(self.samples)
            except SampleError:
                self.position += 1
                if mine:
                    raise
                continue
            self.position += 1
            if mine:
                return sample
