"""Training of factors on a target: one recipe for all methods, seeds side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlkr.adapters.base import Adapter
from vlkr.approximation.distances import squared_distance, stacked_deltas, stacked_factors


@dataclass(frozen=True)
class Recipe:
    """The published recipe: AdamW on the Frobenius distance.

    Args:
        iterations: evaluations of the distance; a step lies between two of them.
        lr: constant learning rate.
        weight_decay: AdamW's.
    """

    iterations: int = 300
    lr: float = 0.1
    weight_decay: float = 0.01


def fit(adapters: Sequence[Adapter], targets: Tensor, recipe: Recipe) -> Tensor:
    """Trains equal adapters, each on its own target.

    The sum of their distances is minimised, which leaves each one's gradient as it is alone.

    Args:
        adapters: of one class, shape and set of options, with their initial factors.
        targets: ``(adapters, out_features, in_features)``.
        recipe: iterations and optimizer.

    Returns:
        The changes ``(adapters, out_features, in_features)`` of the last evaluation.
    """
    device = targets.device
    factors = {
        n: f.to(device).detach().requires_grad_() for n, f in stacked_factors(adapters).items()
    }
    optimizer = torch.optim.AdamW(
        list(factors.values()), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    for adapter in adapters:
        adapter.to(device)
    distance = squared_distance(adapters, targets)
    # Rounding of the expanded square may make a tiny distance negative.
    floor = 1e-12 * targets.square().sum((1, 2)) + torch.finfo(targets.dtype).tiny
    for _ in range(recipe.iterations - 1):
        optimizer.zero_grad()
        distance(factors).maximum(floor).sqrt().sum().backward()
        optimizer.step()
    with torch.no_grad():
        return stacked_deltas(adapters, factors).detach()
