"""Composing once per optimizer step, where it accumulates the gradients of many batches."""

from __future__ import annotations

import torch
from torch import nn

from vlkr.adapters.inject import hosts
from vlkr.adapters.linear import Part, compose


class ComposedOnce:
    """Between :meth:`begin` and :meth:`finish` forward passes share one composed weight.

    The batches accumulate the gradient of that weight, and :meth:`finish` takes it to the factors:
    the same gradients as without, up to rounding, for one composition and not one a batch. Costs
    the composed weights and their gradients in memory. Methods with a low-rank path stay on it.

    Args:
        model: with adapters, on one process (the gradients bypass DDP's reduction).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.open = False

    @torch.no_grad()
    def begin(self) -> None:
        """Composes the weights."""
        self.open = True
        for _, host in hosts(self.model):
            for parameter in host.adapted_parameters():
                parts = _composing(host.parts(parameter))
                if parts:
                    leaf = compose(host.get_parameter(parameter), parts)
                    host.composed_once[parameter] = leaf.requires_grad_()

    def finish(self) -> None:
        """Adds the accumulated gradients to the factors'."""
        self.open = False
        for _, host in hosts(self.model):
            for parameter, leaf in host.composed_once.items():
                if leaf.grad is not None:
                    parts = _composing(host.parts(parameter))
                    compose(host.get_parameter(parameter), parts).backward(leaf.grad)
            host.composed_once = {}


def _composing(parts: list[Part]) -> list[Part]:
    return [part for part in parts if not part.adapter.factored]
