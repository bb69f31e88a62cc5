"""Ranks, processes and devices; progress and silence. Imports torch only where it computes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn

from vlkr.errors import VlkrError

if TYPE_CHECKING:
    import torch

J = TypeVar("J")
R = TypeVar("R")


def _process_group() -> Any:
    """Returns torch.distributed if a process group is initialized, else None."""
    dist = sys.modules.get("torch.distributed")
    is_up = dist is not None and dist.is_available() and dist.is_initialized()
    return dist if is_up else None


def rank() -> int:
    """Returns this process's rank in the process group; 0 if there is none."""
    group = _process_group()
    return int(group.get_rank()) if group else 0


def world_size() -> int:
    """Returns the number of processes in the process group; 1 if there is none."""
    group = _process_group()
    return int(group.get_world_size()) if group else 1


def is_first_process() -> bool:
    """Whether this process writes files and prints results.

    Before a process group is initialized, the launcher's environment decides.
    """
    if _process_group():
        return rank() == 0
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def gather(value: R, error: Exception | None = None) -> list[R]:
    """Returns every process's value, ordered by rank; raises on all of them what one has met.

    Args:
        value: this process's value.
        error: raised on this process in place of a value.
    """
    parts: list[tuple[R, Exception | None]] = [(value, error)]
    if world_size() > 1:
        parts *= world_size()
        _process_group().all_gather_object(parts, (value, error))
    for _, problem in parts:
        if problem is not None:
            raise problem
    return [part for part, _ in parts]


def pick_device(name: str) -> torch.device:
    """Returns torch's device; ``"auto"`` is the first GPU if there is one, else the CPU.

    Raises:
        VlkrError: if the device is not available.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise VlkrError(f"device {name!r} is not available, try 'cpu' or 'auto'") from error
    return device


@contextmanager
def processes(devices: int, device: str) -> Iterator[str]:
    """Runs the block in ``devices`` processes and yields the device of each.

    Processes started by ``torchrun`` are used as they are. Otherwise they are started here, and
    each runs the whole program up to this block, as Lightning's ``ddp`` strategy does.

    Args:
        devices: number of processes on this machine.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        VlkrError: if there are fewer devices.
    """
    import torch.distributed as dist

    if devices < 1:
        raise VlkrError(f"number of devices {devices} is too small, expected at least 1")
    nodes = 1
    if dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    target = pick_device(device)
    if devices * nodes == 1 or dist.is_initialized():
        yield device
        return
    if target.index is not None:
        raise VlkrError(f"requested {devices} devices, but --device names one: {device}")
    if target.type == "cuda" and devices > (there := _cuda_devices()):
        raise VlkrError(f"requested {devices} devices, but only {there} available")

    from lightning.fabric import Fabric

    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(accelerator=target.type, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    try:
        yield str(fabric.device)
    finally:
        dist.destroy_process_group()


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()


def check_num_workers(num_workers: int) -> None:
    """Raises :class:`VlkrError` if the number is negative."""
    if num_workers < 0:
        raise VlkrError(f"number of workers {num_workers} is negative, expected 0 or more")


class _Jobs(Generic[J, R]):
    """A map-style dataset whose items are the results of a function."""

    def __init__(self, function: Callable[[J], R], jobs: Sequence[J]) -> None:
        self.function = function
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> R:
        return self.function(self.jobs[index])


def parallel_map(function: Callable[[J], R], jobs: Sequence[J], num_workers: int) -> Iterator[R]:
    """Yields ``map(function, jobs)`` in order, computed by worker processes.

    Worker ``i`` of ``n`` gets the jobs ``i``, ``i + n``, ... in turn.

    Args:
        function: called in the workers, each of which keeps a copy; its results are pickled.
        jobs: its arguments.
        num_workers: number of processes; 0 computes in this one.
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


def _same(value: Any) -> Any:
    return value


def interleave_jobs(jobs: Sequence[J], num_workers: int) -> list[J]:
    """Orders jobs so that each worker of :func:`parallel_map` gets consecutive ones.

    >>> interleave_jobs(["a", "b", "c", "d", "e"], 2)
    ['a', 'd', 'b', 'e', 'c']
    """
    count = max(num_workers, 1)
    starts = [-(-len(jobs) * i // count) for i in range(count + 1)]
    parts = [jobs[start:stop] for start, stop in pairwise(starts)]
    parts.sort(key=len, reverse=True)
    longest = len(parts[0])
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def without_traceback(values: Iterable[R]) -> Iterator[R]:
    """Yields the values; strips a worker's traceback from the :class:`VlkrError` it raised."""
    try:
        yield from values
    except VlkrError as error:
        mark = f"{type(error).__module__}.{type(error).__name__}: "
        _, is_from_worker, reason = str(error).rpartition(mark)
        if is_from_worker:
            raise type(error)(reason.strip()) from None
        raise


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Returns a transient progress bar on stderr, shown by the first process on a terminal.

    Args:
        columns: shown after description and bar; count and remaining time by default.
    """
    console = Console(stderr=True)
    is_worker = multiprocessing.parent_process() is not None
    return Progress(
        *Progress.get_default_columns()[:2],
        *(columns or (MofNCompleteColumn(), TimeRemainingColumn())),
        console=console,
        transient=True,
        disable=not console.is_terminal or is_worker or not is_first_process(),
    )


@contextmanager
def quiet(*loggers: str, level: int = logging.ERROR, ignore: Iterable[str] = ()) -> Iterator[None]:
    """Silences log records below a level, and warnings that a user cannot act on.

    Args:
        loggers: names; ``""`` is the root logger.
        level: lowest level that is still logged.
        ignore: regular expressions that match the beginning of warnings.
    """
    named = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in named]
    for logger in named:
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            for message in ignore:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, before in zip(named, levels, strict=True):
            logger.setLevel(before)
