"""Tensors on disk under the hash of all they depend on: class embeddings and image features."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlkr.errors import VlkrError
from vlkr.files import atomic_file

LIMIT = 4 * 2**30
"""Bytes that the cache keeps; what was used longest ago goes first."""


def cache_folder() -> Path:
    """``$VLKR_CACHE``, or ``~/.cache/vlkr``."""
    return Path(os.environ.get("VLKR_CACHE") or Path.home() / ".cache" / "vlkr")


def cached(
    kind: str, key: Mapping[str, Any], make: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and texts from the cache, or makes and keeps them.

    A file that is damaged is made anew. A folder that cannot be written is a warning.

    Args:
        kind: the subfolder.
        key: all that the tensors depend on; JSON.
        make: gives tensors by name, and texts by name.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / kind / f"{digest}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                texts = dict(file.metadata() or {})
            os.utime(path)
        except (SafetensorError, OSError):
            pass  # damaged, or removed by another process: made anew below
        else:
            return found, texts
    tensors, texts = make()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_file(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata=texts)
        _forget_oldest(path)
    except (VlkrError, SafetensorError, OSError) as error:
        warnings.warn(f"nothing is cached: {error}; --no-cache turns it off", stacklevel=2)
    return tensors, texts


def _forget_oldest(newest: Path) -> None:
    sizes: dict[Path, int] = {}
    used: dict[Path, float] = {}
    for path in cache_folder().glob("*/*.safetensors"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # by another process
            continue
        sizes[path], used[path] = stat.st_size, stat.st_mtime
    total = sum(sizes.values())
    for path in sorted(used, key=lambda p: used[p]):
        if total <= LIMIT or path == newest:
            break
        path.unlink(missing_ok=True)
        total -= sizes[path]
