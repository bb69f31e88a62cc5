"""The host of adapters on a linear projection: one matrix product forward, two backward.

A change of full rank has no cheap product with the input, so it is composed with the base weight
and the sum is used in one product. Neither the change nor the composed weight is kept for
backward: they are rebuilt there from the factors, which is elementwise work only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from vlkr.adapters.base import Adapter


class Slot(NamedTuple):
    """A place for an adapter in a host module.

    Attributes:
        parameter: its name in the host, such as ``"weight"``, ``"out_proj.weight"``, ``"bias"``.
        rows: first and past-the-last row of the part that is adapted, None for all of it.
    """

    parameter: str
    rows: tuple[int, int] | None = None

    def select(self, weight: Tensor) -> Tensor:
        """The part of ``weight`` that is adapted, a view."""
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]


class Part(NamedTuple):
    """An adapter at work on (a slice of) a weight, and the factor that its change is scaled by."""

    adapter: Adapter
    slot: Slot
    scale: float


def compose(weight: Tensor, parts: Sequence[Part], dtype: torch.dtype | None = None) -> Tensor:
    """The adapted weight ``(out_features, in_features)``, summed in fp32 or wider.

    Args:
        weight: the base weight, which is not touched.
        parts: its adapters.
        dtype: of the result, None for the base weight's.

    Returns:
        A tensor of its own memory, of the base weight's shape.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            composed = weight.to(wide, copy=True)
            for adapter, slot, scale in parts:
                delta = adapter.delta(slot.select(weight))
                if slot.rows is None:
                    composed = torch.add(composed, delta, alpha=scale)
                else:
                    slot.select(composed).add_(delta, alpha=scale)
        else:
            source, composed = _summands(weight, parts)
            for adapter, slot, scale in parts:
                own = slot.select(weight)
                adapter.add_delta(own, slot.select(source), scale, slot.select(composed))
    return composed.to(dtype or weight.dtype)


def _summands(weight: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """What the changes are added to, and where the sum goes, in fp32 or wider.

    The weight and an empty tensor, if the parts cover each row once; else a copy twice.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = sorted(part.slot.rows or (0, len(weight)) for part in parts)
    borders = [0, *(border for part in rows for border in part), len(weight)]
    if borders[::2] == borders[1::2]:
        return weight, torch.empty_like(weight, dtype=wide)
    copy = weight.to(wide, copy=True)
    return copy, copy


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """``x`` times the adapted weight, plus ``bias``.

    Args:
        x: ``(..., in_features)``.
        weight: the base weight ``(out_features, in_features)``.
        bias: ``(out_features)`` or None.
        parts: the adapters of this weight.

    Returns:
        ``(..., out_features)``.
    """
    factored = [part for part in parts if part.adapter.factored]
    composed = [part for part in parts if not part.adapter.factored]
    if not composed:
        y = F.linear(x, weight, bias)
    elif torch.compiler.is_compiling() or not torch.is_grad_enabled():
        # A compiler fuses the rebuilding into backward by itself.
        y = F.linear(x, compose(weight, composed), bias)
    else:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        factors = [p for part in composed for p in part.adapter.parameters()]
        y = _ComposedLinear.apply(x, weight, bias, composed, *factors)
    slices: dict[tuple[int, int], Tensor] = {}
    for adapter, slot, scale in factored:
        z = adapter(x) if scale == 1 else scale * adapter(x)
        if slot.rows is None:
            y = y + z
        else:
            slices[slot.rows] = slices[slot.rows] + z if slot.rows in slices else z
    return y + _side_by_side(slices, y) if slices else y


def _side_by_side(slices: dict[tuple[int, int], Tensor], like: Tensor) -> Tensor:
    """Joins the columns' changes, zero where there is none; a join is free in backward."""
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
    """Linear with a composed weight that is rebuilt in backward, never stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: Sequence[Part],
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
            own = {name: next(factors).detach() for name, _ in adapter.named_parameters()}
            needed = {name: factor for name, factor in own.items() if next(needs)}
            columns = flat_grad if slot.rows is None else flat_grad[:, slice(*slot.rows)]
            part, base, out = map(slot.select, (weight.detach(), source, composed))
            grads: dict[str, Tensor] = {}
            with _parameters_of(adapter, own), torch.autocast(x.device.type, enabled=False):
                if adapter.explicit:
                    if need_x:
                        adapter.add_delta(part, base, scale, out)
                    if needed:
                        tall = adapter.out_features > adapter.in_features
                        grad = (flat_x.T @ columns).T if tall else columns.T @ flat_x
                        grads = adapter.factor_gradients(grad.to(composed.dtype))
                else:
                    with torch.enable_grad():
                        leaves = [factor.requires_grad_() for factor in needed.values()]
                        delta = adapter.delta(part)
                    if need_x:
                        torch.add(base, delta.detach(), alpha=scale, out=out)
                    if needed:
                        grad = (columns.T @ flat_x).to(delta.dtype)
                        found = torch.autograd.grad(delta, leaves, grad)
                        grads = dict(zip(needed, found, strict=True))
            grad_factors += [grads[name].mul(scale) if name in needed else None for name in own]
        grad_x = grad_y @ composed.to(grad_y.dtype) if need_x else None
        grad_weight = flat_grad.T @ flat_x if need_weight else None
        grad_bias = flat_grad.sum(0) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, *grad_factors


@contextmanager
def _parameters_of(adapter: Adapter, factors: dict[str, Tensor]) -> Iterator[None]:
    """Puts other factors in place of the adapter's own, which may have moved on."""
    own = dict(adapter._parameters)
    try:
        adapter._parameters.update(factors)  # type: ignore[arg-type]
        yield
    finally:
        adapter._parameters.update(own)


class AdapterHost(nn.Module):
    """Mixed into the class of a module while adapters sit on its weights.

    The module keeps its identity, its parameters and their names; only its class changes, and
    removing the adapters gives that back.

    Attributes:
        adapters: the modules, by adapter name and slot name.
        slots: where in this module, by slot name.
        adapter_scales: factor of all changes, by adapter name.
        active: names of the adapters at work.
        composed_once: weights that the batches of one optimizer step share.
        base_class: to go back to.
        is_merged: the changes are in the weights for now.
        hook: does nothing but keep torch's fused encoder layer from bypassing this module.
    """

    adapters: nn.ModuleDict
    slots: dict[str, Slot]
    adapter_scales: dict[str, float]
    active: tuple[str, ...]
    composed_once: dict[str, Tensor]
    base_class: type[nn.Module]
    is_merged: bool
    hook: RemovableHandle

    def parts(self, parameter: str) -> list[Part]:
        """The adapters at work on ``parameter``, by its name in this module."""
        return [
            Part(cast(Adapter, adapter), self.slots[slot], self.adapter_scales[name])
            for name in self.active
            if self.adapter_scales[name] != 0
            for slot, adapter in cast(nn.ModuleDict, self.adapters[name]).items()
            if self.slots[slot].parameter == parameter
        ]

    def operands(self, parameter: str) -> tuple[Tensor, list[Part]]:
        """The weight to start from, and the adapters that are not in it yet."""
        parts = self.parts(parameter)
        if parameter in self.composed_once:
            return self.composed_once[parameter], [p for p in parts if p.adapter.factored]
        return self.get_parameter(parameter), parts

    def adapted_bias(self, parameter: str) -> Tensor | None:
        """The bias, with its adapters' changes when it has any."""
        if not _has_parameter(self, parameter):
            return None
        bias, parts = self.operands(parameter)
        return compose(bias, parts) if parts else bias

    def adapted_parameters(self) -> list[str]:
        """Names of the parameters that carry an adapter."""
        return list(dict.fromkeys(slot.parameter for slot in self.slots.values()))


def _has_parameter(module: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return module.get_submodule(owner)._parameters.get(name) is not None


class AdaptedLinear(AdapterHost, nn.Linear):
    """:class:`torch.nn.Linear` with adapters on its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)``."""
        weight, parts = self.operands("weight")
        return adapted_linear(x, weight, self.adapted_bias("bias"), parts)
