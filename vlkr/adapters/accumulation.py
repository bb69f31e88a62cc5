"""Composes each weight once per optimizer step during gradient accumulation."""

from __future__ import annotations

import torch
from torch import nn

from vlkr.adapters.compose import ActiveAdapter, base_parameter, compose
from vlkr.adapters.hosts import adapter_layers


class ComposedWeightCache:
    """Lets forward passes between :meth:`begin` and :meth:`finish` share one composed weight.

    The batches accumulate the gradient of that weight, and :meth:`finish` propagates it to the
    factors: the same gradients up to rounding, for one composition instead of one per batch. Costs
    the composed weights and their gradients in memory. Methods with a low-rank forward keep it.

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
        for _, host in adapter_layers(self.model):
            for parameter in host.adapted_parameters():
                parts = _composing(host.parts(parameter))
                if parts:
                    leaf = compose(base_parameter(host, parameter), parts)
                    host.composed_weights[parameter] = leaf.requires_grad_()

    def finish(self) -> None:
        """Adds the accumulated gradients to the factors'."""
        self.open = False
        for _, host in adapter_layers(self.model):
            for parameter, leaf in host.composed_weights.items():
                if leaf.grad is not None:
                    parts = _composing(host.parts(parameter))
                    compose(base_parameter(host, parameter), parts).backward(leaf.grad)
            host.composed_weights = {}


def _composing(parts: list[ActiveAdapter]) -> list[ActiveAdapter]:
    return [part for part in parts if not part.adapter.has_low_rank_forward]
