"""Squared Frobenius distances of adapters' changes to targets, as functions of the factors.

An adapter's own ``delta()`` gives the distance of any method. Where the change is linear in a low
rank or in a frozen basis, expanding the square spares composing it: ``|P|^2 - 2 <P, T> + |T|^2``,
each term from the factors. LoRA, KronA and KRAdapter are one case: a low-rank approximation of the
target, of its blocks or of its rows laid out as matrices.
"""

from __future__ import annotations

import copy
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
    _, buffers = stack_module_state([_Delta(adapter) for adapter in adapters])  # type: ignore[arg-type]
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
    return lambda factors: (stacked_deltas(adapters, factors) - targets).square().sum((1, 2))


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
        grad_left = scale * (left @ from_right - target @ right.mT)
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
        return 2 * grad[:, None, None] * residual, None, None, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _energy(targets: Tensor) -> Tensor:
    return targets.square().sum((1, 2))


def _lora(adapters: Sequence[LoRA], targets: Tensor) -> Distance:
    energy, scaling = _energy(targets), adapters[0].scaling
    return lambda f: _LowRank.apply(scaling * f["lora_B"], f["lora_A"], targets, energy)


def _krona(adapters: Sequence[KronA], targets: Tensor) -> Distance:
    energy, scale = _energy(targets), adapters[0].scale
    (_, a1, a2), (_, b1, b2) = adapters[0].krona_A.shape, adapters[0].krona_B.shape
    grid = targets.view(-1, a1, b1, a2, b2).transpose(2, 3).reshape(-1, a1 * a2, b1 * b2)

    def distance(f: Factors) -> Tensor:
        return _LowRank.apply(
            scale * f["krona_A"].flatten(2).mT, f["krona_B"].flatten(2), grid, energy
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
    grid = nn.functional.pad(rows, (0, free)).reshape(-1, short, k2, k1)
    energy = grid.square().sum((-2, -1))

    def distance(f: Factors) -> Tensor:
        left = adapter.scale * f[outer_name].movedim(1, -1)  # (adapters, short, k2, terms)
        right = f[inner_name].movedim(1, 2)  # (adapters, short, terms, k1)
        squares = _LowRank.apply(left, right, grid, energy).sum(1)
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
        left = adapter.scaling * f["randlora_lambda"].unsqueeze(-1)
        core = (left * shared) * f["randlora_gamma"].unsqueeze(2)
        return _FrozenBasis.apply(core.flatten(1, 2), gram, linear, energy)

    return distance


def _vera(adapters: Sequence[VeRA], targets: Tensor) -> Distance:
    left = torch.stack([a.B.mT for a in adapters])
    basis = torch.stack([a.A for a in adapters])
    gram, linear, energy = basis @ basis.mT, basis @ targets.mT, _energy(targets)

    def distance(f: Factors) -> Tensor:
        core = left * f["vera_d"].unsqueeze(2) * f["vera_b"].unsqueeze(1)
        return _FrozenBasis.apply(core, gram, linear, energy)

    return distance


_EXPANDED: dict[type[Adapter], Callable[..., Distance | None]] = {
    LoRA: _lora,
    KronA: _krona,
    KRAdapter: _kradapter,
    RandLoRA: _randlora,
    VeRA: _vera,
}
