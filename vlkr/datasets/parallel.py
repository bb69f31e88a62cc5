"""Work on the parts of a dataset by several processes, and the errors that these meet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

from vlkr.errors import VlkrError

J = TypeVar("J")
R = TypeVar("R")


class _Jobs(Generic[J, R]):
    """A dataset in :class:`torch.utils.data.DataLoader`'s sense."""

    def __init__(self, function: Callable[[J], R], jobs: Sequence[J]) -> None:
        self.function = function
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> R:
        return self.function(self.jobs[index])


def parallel_map(function: Callable[[J], R], jobs: Sequence[J], num_workers: int) -> Iterator[R]:
    """``map(function, jobs)``, in order, by processes that each keep a copy of ``function``.

    Process ``i`` of ``n`` gets the jobs ``i``, ``i + n``, ..., one behind the other.

    Args:
        function: called in the workers; what it returns is pickled between the processes.
        jobs: what it is called with.
        num_workers: processes; 0 works in this one.
    """
    from torch.utils.data import DataLoader

    check_num_workers(num_workers)
    loader = DataLoader[Any](
        _Jobs(function, jobs),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=min(num_workers, len(jobs)),
        collate_fn=_same,
    )
    yield from without_traceback(loader)


def check_num_workers(num_workers: int) -> None:
    """Raises :class:`VlkrError` for a negative number."""
    if num_workers < 0:
        raise VlkrError(f"number of workers {num_workers} is negative, expected 0 or more")


def runs(jobs: Sequence[J], num_workers: int) -> list[J]:
    """The jobs in the order that gives each worker of :func:`parallel_map` consecutive ones.

    >>> runs(["a", "b", "c", "d", "e"], 2)
    ['a', 'd', 'b', 'e', 'c']
    """
    count = max(num_workers, 1)
    starts = [-(-len(jobs) * i // count) for i in range(count + 1)]
    parts = [jobs[start:stop] for start, stop in pairwise(starts)]
    parts.sort(key=len, reverse=True)
    longest = len(parts[0])
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def _same(value: Any) -> Any:
    return value


def without_traceback(values: Iterable[R]) -> Iterator[R]:
    """The same values; a worker's :class:`VlkrError` says what is wrong, not where in the code."""
    try:
        yield from values
    except VlkrError as error:
        mark = f"{type(error).__module__}.{type(error).__name__}: "
        _, found, reason = str(error).rpartition(mark)
        if found:
            raise type(error)(reason.strip()) from None
        raise


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
