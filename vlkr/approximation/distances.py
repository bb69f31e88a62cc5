"""Squared Frobenius distances of adapters' changes to targets, as functions of the factors.

An adapter's own ``delta()`` gives the distance of any method. Where the change is linear in a low
rank or in a frozen basis, expanding the square spares composing it: ``|P|^2 - 2 <P, T> + |T|^2``,
each term from the factors. LoRA, KronA and KRAdapter are one case: a low-rank approximation of the
target, of its blocks or of its rows laid out as matrices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
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
from vlkr.adapters.sinlora import SinLoRA
from vlkr.adapters.vera import VeRA

Factors = Mapping[str, Tensor]
#: maps stacked factors to the squared distance ``(adapters,)``
Distance = Callable[[Factors], Tensor]


class _Delta(nn.Module):
    """A module whose ``forward`` is the adapter's change, as ``functional_call`` needs it."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self) -> Tensor:
        return self.adapter.delta()


def stacked_factors(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Trainable factors of equal adapters, stacked to leaves ``(adapters, ...)``."""
    return {
        name: torch.stack([a.get_parameter(name).detach() for a in adapters]).requires_grad_()
        for name, _ in adapters[0].named_parameters()
    }


def stacked_deltas(adapters: Sequence[Adapter], factors: Factors) -> Tensor:
    """Changes ``(adapters, out_features, in_features)`` of equal adapters with these factors."""
    wrapped = {f"adapter.{name}": factor for name, factor in factors.items()}
    if len(adapters) == 1:
        single = {name: factor.squeeze(0) for name, factor in wrapped.items()}
        return cast(Tensor, functional_call(_Delta(adapters[0]), single, ())).unsqueeze(0)
    _, buffers = stack_module_state([_Delta(adapter) for adapter in adapters])
    skeleton = copy.deepcopy(_Delta(adapters[0])).to("meta")
    return cast(
        Tensor,
        vmap(lambda state: functional_call(skeleton, state, ()))({**wrapped, **buffers}),
    )


def squared_distance(adapters: Sequence[Adapter], targets: Tensor) -> Distance:
    """The squared distance of each adapter's change to its target, differentiable.

    Args:
        adapters: of one class, shape and set of options.
        targets: ``(adapters, out_features, in_features)``.
    """
    for cls, make in _EXPANDED.items():
        if type(adapters[0]).delta is cls.delta and (distance := make(adapters, targets)):
            return distance
    return composed_distance(adapters, targets)


def composed_distance(adapters: Sequence[Adapter], targets: Tensor) -> Distance:
    """The distance by way of ``delta()``, for every method."""
    space = torch.empty_like(targets)
    return lambda factors: _apply(_Composed, stacked_deltas(adapters, factors), targets, space)


class _Composed(torch.autograd.Function):
    """``|matrix - target|^2`` in as few passes over memory as there can be."""

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


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return cast(Tensor, function.apply(*arguments))


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
        return _apply(
            _LowRank, scale * f["krona_A"].flatten(2).mT, f["krona_B"].flatten(2), grid, energy
        )

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
    # Entries beyond the long side are cut off, so they count for nothing: their squares, which
    # the zeros that they meet here would charge, are taken off again.
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


class _RandomBases(torch.autograd.Function):
    """RandLoRA's distance from its Gram matrix, with few passes over what is as large as a weight.

    ``core[n, r] = weights[n, r] * shared[r] * gamma[n]`` are the coordinates in the frozen bases.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        gamma: Tensor,
        shared: Tensor,
        gram: Tensor,
        linear: Tensor,
        energy: Tensor,
        core: Tensor,
        residual: Tensor,
    ) -> Tensor:
        torch.mul(weights.unsqueeze(-1), shared.unsqueeze(1), out=core.view(*weights.shape, -1))
        core.view(*weights.shape, -1).mul_(gamma.unsqueeze(2))
        torch.bmm(gram, core, out=residual).sub_(linear)
        ctx.save_for_backward(weights, gamma, shared, residual)
        return _inner(core, residual) - _inner(core, linear) + energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, gamma, shared, residual = ctx.saved_tensors
        pulled = residual.view(*weights.shape, -1).mul_(shared.unsqueeze(1))
        scale = 2 * grad[:, None, None]
        grad_weights = scale * (pulled @ gamma.unsqueeze(-1)).squeeze(-1)
        grad_gamma = scale * (weights.unsqueeze(2) @ pulled).squeeze(2)
        return grad_weights, grad_gamma, None, None, None, None, None, None


def _randlora(adapters: Sequence[RandLoRA], targets: Tensor) -> Distance:
    adapter = adapters[0]
    if adapter.out_features <= adapter.in_features:
        targets = targets.mT
    basis = torch.stack([a.B.flatten(1) for a in adapters])
    shared = torch.stack([a.A for a in adapters])
    gram, linear, energy = basis.mT @ basis, basis.mT @ targets, _energy(targets)
    spaces = torch.empty_like(linear), torch.empty_like(linear)

    def distance(f: Factors) -> Tensor:
        weights = adapter.scaling * f["randlora_lambda"]
        fixed = shared, gram, linear, energy
        return _apply(_RandomBases, weights, f["randlora_gamma"], *fixed, *spaces)

    return distance


class _Sine(torch.autograd.Function):
    """``|sin(left @ right) / gain - target|^2``, the large matrices overwritten where they can."""

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        target: Tensor,
        gain: float,
        phase: Tensor,
        difference: Tensor,
    ) -> Tensor:
        torch.bmm(left, right, out=phase)
        torch.sin(phase, out=difference).div_(gain).sub_(target)
        ctx.save_for_backward(left, right, phase, difference)
        ctx.gain = gain
        return _inner(difference, difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, phase, difference = ctx.saved_tensors
        grad_phase = phase.cos_().mul_(difference)
        scale = 2 / ctx.gain * grad[:, None, None]
        grad_left = scale * (right @ grad_phase.mT).mT
        return grad_left, scale * (left.mT @ grad_phase), None, None, None, None


def _sinlora(adapters: Sequence[SinLoRA], targets: Tensor) -> Distance:
    frequency, gain = adapters[0].frequency, adapters[0].gain
    gain = math.sqrt(adapters[0].in_features) if gain is None else gain
    spaces = torch.empty_like(targets), torch.empty_like(targets)
    return lambda f: _apply(_Sine, frequency * f["lora_B"], f["lora_A"], targets, gain, *spaces)


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
    SinLoRA: _sinlora,
    KronA: _krona,
    KRAdapter: _kradapter,
    RandLoRA: _randlora,
    VeRA: _vera,
}
