"""Processes that share the images of an evaluation, through Lightning Fabric."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from vlkr.errors import VlkrError
from vlkr.models.clip import pick_device

T = TypeVar("T")


@contextmanager
def processes(devices: int, device: str) -> Iterator[str]:
    """Within the block there are ``devices`` processes, each with the device it is told.

    They are started here, or were by ``torchrun``, whose number counts. Started here, each runs
    the whole program anew up to this place, as Lightning's ``ddp`` does.

    Args:
        devices: processes on this machine.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        VlkrError: for devices that are not there.
    """
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
        raise VlkrError(f"{devices} devices are asked for, and --device names one: {device}")
    if target.type == "cuda" and devices > torch.cuda.device_count():
        raise VlkrError(f"{devices} devices are asked for, {torch.cuda.device_count()} are there")

    from lightning.fabric import Fabric

    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(accelerator=target.type, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    try:
        yield str(fabric.device)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Of this process among those that share the images; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that share the images."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T, error: Exception | None = None) -> list[T]:
    """What every process has, by rank; raises on all of them what one has met.

    Args:
        value: of this process.
        error: met by this process in place of a value.
    """
    found: list[tuple[T, Exception | None]] = [(value, error)]
    if world_size() > 1:
        found *= world_size()
        dist.all_gather_object(found, (value, error))
    for _, problem in found:
        if problem is not None:
            raise problem
    return [part for part, _ in found]
