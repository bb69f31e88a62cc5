from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def weights_hash(model: nn.Module, *, without: str | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes of the base weights, adapters left out.

    Persistent buffers count. The hash is the same before and after :func:`vlkr.add_adapters`.

    Args:
        model: any module.
        without: a child module that is left out too, by name.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if ".adapters." in f".{key}" or (without and key.startswith(f"{without}.")):
            continue
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{key}|{data.dtype}|{tuple(data.shape)}|".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a value's JSON, its keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
