from __future__ import annotations

import hashlib

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
