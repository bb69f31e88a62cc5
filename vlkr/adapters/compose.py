"""Adapted linear maps: one matrix product forward, two backward.

An update of full rank has no cheap product with the input, so it is composed with the base weight
and the sum is used in one product. Neither the update nor the composed weight is kept for
backward: they are rebuilt there from the factors, which is elementwise work only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlkr.adapters.base import Adapter


class Slot(NamedTuple):
    """A position for an adapter in a host module.

    Attributes:
        parameter: name in the host, such as ``"weight"``, ``"out_proj.weight"``, ``"bias"``.
        rows: first row and end of the adapted slice, None for the whole parameter.
    """

    parameter: str
    rows: tuple[int, int] | None = None

    def select(self, weight: Tensor) -> Tensor:
        """Returns the adapted slice of ``weight``, a view."""
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]


def base_parameter(module: nn.Module, path: str) -> nn.Parameter:
    """Returns a parameter by its name in a module, without the updates of adapters.

    Raises:
        KeyError: if there is none.
    """
    owner, _, name = path.rpartition(".")
    parameter = module.get_submodule(owner)._parameters[name]
    if parameter is None:
        raise KeyError(path)
    return parameter


class ActiveAdapter(NamedTuple):
    """An active adapter, the (slice of a) weight it updates, and the scale of its update."""

    adapter: Adapter
    slot: Slot
    scale: float


def _is_transformed() -> bool:
    """Whether torch.compile or torch.func traces this call, so that nothing is written in place."""
    compiling: bool = torch.compiler.is_compiling()
    return compiling or torch._C._are_functorch_transforms_active()


def compose(
    weight: Tensor, parts: Sequence[ActiveAdapter], dtype: torch.dtype | None = None
) -> Tensor:
    """Returns the adapted weight ``(out_features, in_features)``, summed in fp32 or wider.

    Args:
        weight: the base weight, which is not modified.
        parts: its active adapters.
        dtype: dtype of the result, by default that of the base weight.

    Returns:
        A new tensor of the base weight's shape.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        if torch.is_grad_enabled() or _is_transformed():
            composed = weight.to(wide, copy=True)
            for adapter, slot, scale in parts:
                delta = adapter.delta(slot.select(weight))
                if slot.rows is None:
                    composed = torch.add(composed, delta, alpha=scale)
                elif _is_transformed():
                    rows = torch.add(slot.select(composed), delta, alpha=scale)
                    composed = torch.slice_scatter(composed, rows, 0, *slot.rows)
                else:
                    slot.select(composed).add_(delta, alpha=scale)
        else:
            source, composed = _summands(weight, parts)
            for adapter, slot, scale in parts:
                own = slot.select(weight)
                adapter.add_delta(own, slot.select(source), scale, slot.select(composed))
    return composed.to(dtype or weight.dtype)


def _summands(weight: Tensor, parts: Sequence[ActiveAdapter]) -> tuple[Tensor, Tensor]:
    """Returns what the updates are added to and where the sum goes, in fp32 or wider.

    That is the weight and an empty tensor if the parts cover each row once, else one copy twice.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = sorted(part.slot.rows or (0, len(weight)) for part in parts)
    borders = [0, *(border for part in rows for border in part), len(weight)]
    if borders[::2] == borders[1::2]:
        return weight, torch.empty_like(weight, dtype=wide)
    copy = weight.to(wide, copy=True)
    return copy, copy


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[ActiveAdapter]
) -> Tensor:
    """Applies the adapted weight to ``x`` and adds ``bias``.

    Args:
        x: ``(..., in_features)``.
        weight: the base weight ``(out_features, in_features)``.
        bias: ``(out_features)`` or None.
        parts: the active adapters of this weight.

    Returns:
        ``(..., out_features)``.
    """
    low_rank = [part for part in parts if part.adapter.has_low_rank_forward]
    composed = [part for part in parts if not part.adapter.has_low_rank_forward]
    if not composed:
        y = F.linear(x, weight, bias)
    elif not torch.is_grad_enabled() or _is_transformed():
        # A compiler fuses the recomputation into backward by itself.
        y = F.linear(x, compose(weight, composed), bias)
    else:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        factors = [p for part in composed for p in part.adapter._parameters.values()]
        y = _ComposedLinear.apply(x, weight, bias, composed, *factors)
    slices: dict[tuple[int, int], Tensor] = {}
    for adapter, slot, scale in low_rank:
        z = adapter(x) if scale == 1 else scale * adapter(x)
        if slot.rows is None:
            y = y + z
        else:
            slices[slot.rows] = slices[slot.rows] + z if slot.rows in slices else z
    return y + _side_by_side(slices, y) if slices else y


def _side_by_side(slices: dict[tuple[int, int], Tensor], like: Tensor) -> Tensor:
    """Concatenates the slices' outputs, zero where there is none."""
    columns: list[Tensor] = []
    end = 0
    for (first, past), z in sorted(slices.items(), key=lambda item: item[0]):
        if first > end:
            columns.append(like.new_zeros(*like.shape[:-1], first - end))
        columns.append(z)
        end = past
    if end < like.shape[-1]:
        columns.append(like.new_zeros(*like.shape[:-1], like.shape[-1] - end))
    return torch.cat(columns, dim=-1)


class _ComposedLinear(torch.autograd.Function):
    """Linear map with a composed weight that is recomputed in backward, never stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: Sequence[ActiveAdapter],
        *factors: Tensor,
    ) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(x, weight, *factors)
        bias = None if bias is None else bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, compose(weight, parts, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        need_x, need_weight, need_bias, _, *need_factors = ctx.needs_input_grad
        flat_grad, flat_x = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        source, composed = _summands(weight, ctx.parts)
        grad_factors: list[Tensor | None] = []
        factors, needs = iter(saved), iter(need_factors)
        for adapter, slot, scale in ctx.parts:
            own = {name: next(factors).detach() for name in adapter._parameters}
            saved_adapter = _with_factors(adapter, own)
            needed = {name: factor for name, factor in own.items() if next(needs)}
            columns = flat_grad if slot.rows is None else flat_grad[:, slice(*slot.rows)]
            part, base, out = map(slot.select, (weight.detach(), source, composed))
            grads: dict[str, Tensor] = {}
            with torch.autocast(x.device.type, enabled=False):
                if adapter.has_factor_gradients:
                    if need_x:
                        saved_adapter.add_delta(part, base, scale, out)
                    if needed:
                        tall = adapter.out_features > adapter.in_features
                        grad = (flat_x.T @ columns).T if tall else columns.T @ flat_x
                        grads = saved_adapter.factor_gradients(grad.to(composed.dtype))
                else:
                    with torch.enable_grad():
                        leaves = [factor.requires_grad_() for factor in needed.values()]
                        delta = saved_adapter.delta(part)
                    if need_x:
                        torch.add(base, delta.detach(), alpha=scale, out=out)
                    if needed:
                        grad = (columns.T @ flat_x).to(delta.dtype)
                        computed = torch.autograd.grad(delta, leaves, grad)
                        grads = dict(zip(needed, computed, strict=True))
            grad_factors += [grads[name].mul(scale) if name in needed else None for name in own]
        grad_x = grad_y @ composed.to(grad_y.dtype) if need_x else None
        grad_weight = flat_grad.T @ flat_x if need_weight else None
        grad_bias = flat_grad.sum(0) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, *grad_factors


def _with_factors(adapter: Adapter, factors: dict[str, Tensor]) -> Adapter:
    """Returns a shallow copy with the factors of the forward pass; the adapter is untouched."""
    saved = object.__new__(type(adapter))
    saved.__dict__ = {**adapter.__dict__, "_parameters": factors}
    return saved
