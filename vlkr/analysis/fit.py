"""Fits adapters to matrices: one recipe for all methods, seeds side by side.

An adapter's ``delta()`` gives the squared Frobenius distance of its weight update to a target for
any method. Where the update is linear in a low-rank product or in a frozen basis, expanding the
square avoids composing it: ``|P|^2 - 2 <P, T> + |T|^2``, each term from the factors. LoRA, KronA
and KRAdapter are one case: a low-rank approximation of the target, of its blocks or of its rows
reshaped to matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, stack_module_state, vmap

from vlkr.adapters.base import Adapter
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.krona import KronA
from vlkr.adapters.lora import LoRA
from vlkr.adapters.randlora import RandLoRA
from vlkr.adapters.vera import VeRA

Factors = Mapping[str, Tensor]
#: maps stacked factors to the squared distances ``(adapters,)``
Distance = Callable[[Factors], Tensor]


@dataclass(frozen=True)
class Recipe:
    """The published recipe: AdamW on the Frobenius distance.

    Args:
        iterations: evaluations of the distance; there is a step between two of them.
        lr: constant learning rate.
        weight_decay: AdamW's.
    """

    iterations: int = 300
    lr: float = 0.1
    weight_decay: float = 0.01


def fit(
    adapters: Sequence[Adapter], targets: Tensor, recipe: Recipe, weights: Tensor | None = None
) -> Tensor:
    """Trains equal adapters, each on its own target.

    Minimizes the sum of their distances, so that each one's gradient is as it is alone.

    Args:
        adapters: of one class, shape and set of options, with their initial factors.
        targets: ``(adapters, out_features, in_features)``.
        recipe: iterations and optimizer.
        weights: base weights of that shape, for methods that need them.

    Returns:
        The weight updates ``(adapters, out_features, in_features)`` of the last evaluation.
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
    distance = squared_distance(adapters, targets, weights)
    # Rounding of the expanded square may make a tiny distance negative.
    floor = 1e-12 * targets.square().sum((1, 2)) + torch.finfo(targets.dtype).tiny
    for _ in range(recipe.iterations - 1):
        optimizer.zero_grad()
        distance(factors).maximum(floor).sqrt().sum().backward()
        optimizer.step()
    with torch.no_grad():
        return stacked_deltas(adapters, weights)(factors).detach()


class _Delta(nn.Module):
    """A module whose ``forward`` is the adapter's weight update, for ``functional_call``."""

    def __init__(self, adapter: Adapter, weight: Tensor | None) -> None:
        super().__init__()
        self.adapter = adapter
        self.weight: Tensor | None
        self.register_buffer("weight", weight)

    def forward(self) -> Tensor:
        return self.adapter.delta(self.weight)


def stacked_factors(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Returns the trainable factors of equal adapters, stacked to leaves ``(adapters, ...)``."""
    return {
        name: torch.stack([a.get_parameter(name).detach() for a in adapters]).requires_grad_()
        for name, _ in adapters[0].named_parameters()
    }


def stacked_deltas(adapters: Sequence[Adapter], weights: Tensor | None = None) -> Distance:
    """Returns the map from stacked factors to weight updates.

    Args:
        adapters: of one class, shape and set of options.
        weights: base weights ``(adapters, out_features, in_features)``, if the method needs them.

    Returns:
        A function to ``(adapters, out_features, in_features)``.
    """
    bases = [None] * len(adapters) if weights is None else list(weights)
    modules = [_Delta(a, base) for a, base in zip(adapters, bases, strict=True)]

    def single(factors: Factors) -> Tensor:
        state = {f"adapter.{name}": factor.squeeze(0) for name, factor in factors.items()}
        return cast(Tensor, functional_call(modules[0], state, ())).unsqueeze(0)

    if len(modules) == 1:
        return single
    _, buffers = stack_module_state(cast(list[nn.Module], modules))
    skeleton = copy.deepcopy(modules[0]).to("meta")
    compose = vmap(lambda state: functional_call(skeleton, state, ()))

    def stacked(factors: Factors) -> Tensor:
        state = {f"adapter.{name}": factor for name, factor in factors.items()}
        return cast(Tensor, compose({**state, **buffers}))

    return stacked


def squared_distance(
    adapters: Sequence[Adapter], targets: Tensor, weights: Tensor | None = None
) -> Distance:
    """Returns the differentiable squared distance of each adapter's update to its target.

    Args:
        adapters: of one class, shape and set of options.
        targets: ``(adapters, out_features, in_features)``.
        weights: base weights of that shape, for methods that need them.
    """
    for cls, make in _EXPANDED.items():
        if type(adapters[0]).delta is cls.delta and (distance := make(adapters, targets)):
            return distance
    return composed_distance(adapters, targets, weights)


def composed_distance(
    adapters: Sequence[Adapter], targets: Tensor, weights: Tensor | None = None
) -> Distance:
    """Returns the squared distance by way of ``delta()``, for every method."""
    deltas, buffer = stacked_deltas(adapters, weights), torch.empty_like(targets)
    return lambda factors: _apply(_Composed, deltas(factors), targets, buffer)


class _Composed(torch.autograd.Function):
    """``|matrix - target|^2``, with as few passes over memory as possible."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, target: Tensor, difference: Tensor) -> Tensor:
        torch.sub(matrix, target, out=difference)
        ctx.save_for_backward(difference)
        return _inner(difference, difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return difference.mul_(2 * grad[:, None, None]), None, None


class _LowRank(torch.autograd.Function):
    """``|left @ right - target|^2`` over the last two dimensions, never composed.

    One product with the target forward and one backward; the Gram matrices are small.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, target: Tensor, energy: Tensor) -> Tensor:
        from_left, from_right = left.mT @ left, right @ right.mT
        projected = left.mT @ target
        ctx.save_for_backward(left, right, target, from_left, from_right, projected)
        cross = (projected * right).sum((-2, -1))
        return (from_left * from_right).sum((-2, -1)) - 2 * cross + energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, target, from_left, from_right, projected = ctx.saved_tensors
        scale = 2 * grad[..., None, None]
        grad_left = scale * (left @ from_right - (right @ target.mT).mT)
        return grad_left, scale * (from_left @ right - projected), None, None


class _FrozenBasis(torch.autograd.Function):
    """``|basis @ core - target|^2`` from ``gram = basis.mT @ basis`` and ``basis.mT @ target``."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, gram: Tensor, linear: Tensor, energy: Tensor) -> Tensor:
        residual = (gram @ core).sub_(linear)
        ctx.save_for_backward(residual)
        # <core, gram core> - 2 <core, linear>, without another temporary
        return _inner(core, residual) - _inner(core, linear) + energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (residual,) = ctx.saved_tensors
        return residual.mul_(2 * grad[:, None, None]), None, None, None


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return cast(Tensor, function.apply(*arguments))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.vecdot(a.flatten(1), b.flatten(1)))


def _energy(targets: Tensor) -> Tensor:
    return targets.square().sum((1, 2))


def _lora(adapters: Sequence[LoRA], targets: Tensor) -> Distance:
    energy, scaling = _energy(targets), adapters[0].scaling
    return lambda f: _apply(_LowRank, scaling * f["lora_B"], f["lora_A"], targets, energy)


def _krona(adapters: Sequence[KronA], targets: Tensor) -> Distance:
    energy, scale = _energy(targets), adapters[0].scale
    (_, a1, a2), (_, b1, b2) = adapters[0].krona_A.shape, adapters[0].krona_B.shape
    grid = targets.view(-1, a1, b1, a2, b2).transpose(2, 3).reshape(-1, a1 * a2, b1 * b2)

    def distance(f: Factors) -> Tensor:
        left, right = scale * f["krona_A"].flatten(2).mT, f["krona_B"].flatten(2)
        return _apply(_LowRank, left, right, grid, energy)

    return distance


def _kradapter(adapters: Sequence[KRAdapter], targets: Tensor) -> Distance | None:
    adapter = adapters[0]
    if adapter.num_factors != 2:
        return None
    outer_name, inner_name = ("v", "u") if adapter.rule == "reference" else ("u", "v")
    k1 = adapter.get_parameter(inner_name).shape[-1]
    k2 = adapter.get_parameter(outer_name).shape[-1]
    rows = targets if adapter.out_features <= adapter.in_features else targets.mT
    short, long = rows.shape[1:]
    free = k1 * k2 - long
    # Entries beyond the long side are cut off, so they must not count: their squares, which
    # differ from the zeros of the padding, are subtracted again.
    grid = nn.functional.pad(rows, (0, free)).contiguous().view(-1, short, k2, k1)
    energy = grid.square().sum((-2, -1))

    def distance(f: Factors) -> Tensor:
        left = adapter.scale * f[outer_name].movedim(1, -1)  # (adapters, short, k2, terms)
        right = f[inner_name].movedim(1, 2)  # (adapters, short, terms, k1)
        squares = _apply(_LowRank, left, right, grid, energy).sum(1)
        if free:
            cut = left[:, :, -1:] @ right[..., k1 - free :]
            squares = squares - cut.square().sum((1, 2, 3))
        return squares

    return distance


def _randlora(adapters: Sequence[RandLoRA], targets: Tensor) -> Distance:
    adapter = adapters[0]
    if adapter.out_features <= adapter.in_features:
        targets = targets.mT
    basis = torch.stack([a.B.flatten(1) for a in adapters])
    shared = torch.stack([a.A for a in adapters]).unsqueeze(1)
    gram, linear, energy = basis.mT @ basis, basis.mT @ targets, _energy(targets)

    def distance(f: Factors) -> Tensor:
        weights = adapter.scaling * f["randlora_lambda"]
        core = weights.unsqueeze(-1) * shared * f["randlora_gamma"].unsqueeze(2)
        return _apply(_FrozenBasis, core.flatten(1, 2), gram, linear, energy)

    return distance


def _vera(adapters: Sequence[VeRA], targets: Tensor) -> Distance:
    left = torch.stack([a.B.mT for a in adapters])
    basis = torch.stack([a.A for a in adapters])
    gram, linear, energy = basis @ basis.mT, basis @ targets.mT, _energy(targets)

    def distance(f: Factors) -> Tensor:
        core = left * f["vera_d"].unsqueeze(2) * f["vera_b"].unsqueeze(1)
        return _apply(_FrozenBasis, core, gram, linear, energy)

    return distance


_EXPANDED: dict[type[Adapter], Callable[..., Distance | None]] = {
    LoRA: _lora,
    KronA: _krona,
    KRAdapter: _kradapter,
    RandLoRA: _randlora,
    VeRA: _vera,
}
