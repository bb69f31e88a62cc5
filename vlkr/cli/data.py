"""``vlkr data pack``, ``verify``, ``info`` and ``list``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkr.cli.options import Switch


def pack(
    source: str,
    dest: Path,
    *,
    resize: int | None = None,
    samples_per_shard: int = 1000,
    shard_mb: int = 500,
    test_fraction: float = 0.5,
    num_workers: int = 0,
    max_bad: int = 0,
    allow_commands: Switch = False,
    force: Switch = False,
) -> Any:
    """Writes a dataset as webdataset shards in CLIP_benchmark's layout.

    The shards are identical to the byte whatever the number of workers, and whether or not the
    command was interrupted: run again, it keeps the finished shards and resumes. Images keep their
    bytes, keys, labels and domains, so that few-shot splits stay the same.

    Args:
        source: card name, folder of images or shards, table or URL.
        dest: folder to write.
        resize: shrink images whose shorter side is longer than this many pixels to it; the others
            keep their bytes.
        samples_per_shard: maximum number of images per shard.
        shard_mb: maximum size of the images of a shard before resizing, in 10^6 bytes.
        test_fraction: fraction of images held out for testing if the folder has no splits.
        num_workers: processes that read, resize and write.
        max_bad: maximum number of invalid samples to leave out and report before failing.
        allow_commands: let the source ``pipe:COMMAND`` run.
        force: replace the shards in ``dest``.
    """
    options = locals()
    from vlkr.datasets.packing import pack

    return pack(**options)


def verify(
    source: str,
    *,
    test_fraction: float = 0.5,
    num_workers: int = 0,
    allow_commands: Switch = False,
) -> Any:
    """Decodes every image of a dataset and compares shards with the manifest of their packing.

    The exit status is 1 if something is wrong.

    Args:
        source: folder of shards, or any other dataset.
        test_fraction: fraction of images held out for testing if the folder has no splits.
        num_workers: processes that read and decode.
        allow_commands: let the source ``pipe:COMMAND`` run.
    """
    from vlkr.datasets.inspect import verify

    return verify(source, test_fraction, num_workers, allow_commands)


def info(
    source: str,
    *,
    output: Path | None = None,
    test_fraction: float = 0.5,
    num_workers: int = 0,
    allow_commands: Switch = False,
) -> Any:
    """Counts a dataset's images by class and domain, and shows sizes and formats.

    Args:
        source: card name, folder of images or shards, table or URL.
        output: PNG to write, a contact sheet with some images of each class.
        test_fraction: fraction of images held out for testing if the folder has no splits.
        num_workers: processes that read.
        allow_commands: let the source ``pipe:COMMAND`` run.
    """
    from vlkr.datasets.inspect import info

    return info(source, output, test_fraction, num_workers, allow_commands)


def list_cards(*, suite: str | None = None) -> Any:
    """Lists registered datasets: title, classes, source, license, and whether the data is present.

    Args:
        suite: only those of a benchmark: ``coop``, ``kradapter``, ``imagenet-shift``,
            ``domainbed`` or ``vtab``.
    """
    from vlkr.datasets.catalog import list_cards

    return list_cards(suite)
