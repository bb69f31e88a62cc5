"""Telling where numbers that are not finite come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def first_layer_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Name of the module that gives NaN or infinity first, the innermost, in a forward pass.

    Args:
        model: whose modules are watched.
        forward: runs it.

    Returns:
        None if no module's output has any.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all_finite(_tensors(output)):
                found.append(name)

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite; asks the device once."""
    floating = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    return bool(torch.isfinite(nn.utils.get_total_norm(floating, math.inf)))


def some_of(names: list[str], most: int = 8) -> str:
    """Names for a message.

    >>> some_of(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
