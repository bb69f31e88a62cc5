"""Adds adapters to a model, activates, scales, composes, merges and removes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.compose import ActiveAdapter, Slot, base_parameter, compose
from vlkr.adapters.hosts import (
    AdaptedModule,
    AdapterHost,
    adapter_layers,
    add_slot,
    become_host,
    host_class,
    release,
)
from vlkr.adapters.registry import adapter_class, check_options
from vlkr.adapters.targets import (
    DEFAULT_TARGETS,
    Target,
    bias_targets,
    find_targets,
    warn_of_untouched,
)
from vlkr.errors import VlkrError


def add_adapters(
    model: nn.Module,
    method: str,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    towers: Sequence[str] = ("visual", "text"),
    blocks: Sequence[int] | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> list[Target]:
    """Adds an adapter to every targeted weight and freezes everything else.

    The model's outputs stay the same until the adapters are trained. Modules keep their
    identity and state-dict keys; the adapters' own keys contain ``.adapters.``.

    Args:
        model: any module, changed in place.
        method: ``"kradapter"``, ``"lora"``, ...
        targets: short names (``q k v qkv out fc1 fc2``) or shell patterns of module names.
        towers: ``"visual"``, ``"text"`` or both; a model without towers matches always.
        blocks: indices of transformer blocks, negative from the end; None for all.
        adapter_name: name of the adapters in the modules.
        **options: options of the method, as its class lists them.

    Returns:
        The matched weights.

    Raises:
        VlkrError: if a method, option, tower or block is unknown, or a target matches nothing.
    """
    check_options(method, options)
    matched = find_targets(model, targets, towers, blocks)
    if blocks is None:
        warn_of_untouched(model, matched, targets, towers)
    cls = adapter_class(method)
    if cls.adapts_bias:
        matched = bias_targets(model, matched)
    adapters = [(t, cls(t.in_features, t.out_features, **options)) for t in matched]
    modules = dict(model.named_modules())
    for target, adapter in adapters:
        weight = base_parameter(modules[target.module], target.slot.parameter)
        adapter.init_from_weight(target.slot.select(weight))
    inject_adapters(model, adapters, adapter_name)
    return matched


def inject_adapters(
    model: nn.Module, adapters: Sequence[tuple[Target, Adapter]], adapter_name: str = "default"
) -> None:
    """Injects adapters into their targets, activates only them and freezes everything else.

    Raises:
        VlkrError: if the name is taken or invalid, a target cannot carry its adapter, or adapters
            are merged for now.
    """
    _refuse_merged(model, "add adapters")
    if any(adapter_name in host.adapters for _, host in adapter_layers(model)):
        raise VlkrError(
            f"the model carries adapters named {adapter_name!r} already; merge or remove them first"
        )
    if not adapter_name.isidentifier() or hasattr(nn.ModuleDict, adapter_name):
        raise VlkrError(f"invalid adapter name {adapter_name!r}: use letters, digits and _")
    modules = dict(model.named_modules())
    owners: dict[int, Target] = {}
    for target, adapter in adapters:
        module = modules[target.module]
        weight = base_parameter(module, target.slot.parameter)
        first = owners.setdefault(id(weight), target)
        if (first.module, first.slot.parameter) != (target.module, target.slot.parameter):
            raise VlkrError(
                f"{first.path} and {target.path} share one weight; adapt only one of them"
            )
        if issubclass(host_class(module), AdaptedModule) and getattr(adapter, "dropout", False):
            raise VlkrError(
                f"{target.module} ({type(module).__name__}) composes its weights, so dropout on "
                "the adapter's input is not possible there; use dropout 0"
            )
    for p in model.parameters():
        p.requires_grad_(False)
    for target, adapter in adapters:
        host = become_host(modules[target.module])
        weight = base_parameter(host, target.slot.parameter)
        add_slot(host, target.slot_name, target.slot)
        if adapter_name not in host.adapters:
            host.adapters[adapter_name] = nn.ModuleDict()
            host.adapter_scales[adapter_name] = 1.0
            host.active = (adapter_name,)
        host.adapters[adapter_name][target.slot_name] = adapter.to(weight.device)  # type: ignore[operator]
        host.adapters.train(host.training)
    set_adapter(model, adapter_name)


@dataclass(frozen=True)
class InjectedAdapter:
    """An adapter in a model.

    Attributes:
        module: qualified name of its host.
        name: slot name in the host.
        slot: the parameter that it updates, and its rows.
        adapter: the adapter.
        scale: scale of its update.
    """

    module: str
    name: str
    slot: Slot
    adapter: Adapter
    scale: float

    @property
    def key(self) -> str:
        """Prefix of this adapter's tensors in an adapter file, such as ``visual...attn.q``."""
        return f"{self.module}.{self.name}".lstrip(".")


def injected_adapters(model: nn.Module, adapter_name: str = "default") -> list[InjectedAdapter]:
    """Returns all adapters of one name, in the model's order.

    Raises:
        VlkrError: if the model has none of that name.
    """
    injected = [
        InjectedAdapter(path, name, host.slots[name], adapter, host.adapter_scales[adapter_name])
        for path, host in adapter_layers(model)
        if adapter_name in host.adapters
        for name, adapter in host.adapters[adapter_name].items()  # type: ignore[operator]
    ]
    if not injected:
        raise VlkrError(f"the model carries no adapters named {adapter_name!r}; add_adapters first")
    return injected


def set_adapter(model: nn.Module, *names: str) -> None:
    """Activates only the named adapters; with no names, disables all.

    Only active adapters are trained. The base weights are not modified.

    Raises:
        VlkrError: if the model has no adapters of a name, or adapters are merged for now.
    """
    _refuse_merged(model, "activate adapters")
    for name in names:
        injected_adapters(model, name)
    for _, host in adapter_layers(model):
        host.active = tuple(name for name in host.adapters if name in names)
        for name, adapters in host.adapters.items():
            adapters.requires_grad_(name in names)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of the active adapters, those that training changes."""
    return [
        p
        for _, host in adapter_layers(model)
        for p in host.adapters.parameters()
        if p.requires_grad
    ]


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Returns the adapters' tensors by ``<module>.<slot>.<factor>``, detached."""
    return {
        f"{injected.key}.{factor}": tensor.detach()
        for injected in injected_adapters(model, adapter_name)
        for factor, tensor in injected.adapter.state_dict().items()
    }


def set_adapter_scale(model: nn.Module, scale: float, adapter_name: str = "default") -> None:
    """Scales every update of an adapter: 0 gives the base model, 1 the adapted one.

    Values in between interpolate as WiSE-FT does (arXiv 2109.01903).

    Raises:
        VlkrError: if the model has no adapters of that name, or adapters are merged for now.
    """
    _refuse_merged(model, "scale adapters")
    injected_adapters(model, adapter_name)
    for _, host in adapter_layers(model):
        if adapter_name in host.adapters:
            host.adapter_scales[adapter_name] = float(scale)


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> None:
    """Merges active adapters into the base weights in fp32 and unloads all adapters.

    The model is plain again: the same classes and state-dict keys as before :func:`add_adapters`.
    ``vlkr.merge_adapters`` is the same function.

    Raises:
        VlkrError: if the model has no adapters, or they are merged for now.
    """
    _refuse_merged(model, "merge adapters")
    for _, host in _require_hosts(model):
        for parameter in host.adapted_parameters():
            weight = base_parameter(host, parameter)
            weight.copy_(compose(weight, host.parts(parameter)))
        release(host)


merge_adapters = merge_and_unload


def remove_adapters(model: nn.Module, adapter_name: str | None = None) -> None:
    """Removes adapters; without any, the model is bit-identical to before :func:`add_adapters`.

    Args:
        model: with adapters.
        adapter_name: name of those to remove, by default all.

    Raises:
        VlkrError: if there are none, or adapters are merged for now.
    """
    _refuse_merged(model, "remove adapters")
    if adapter_name is not None:
        injected_adapters(model, adapter_name)
    for _, host in _require_hosts(model):
        if adapter_name is not None and adapter_name in host.adapters:
            del host.adapters[adapter_name]
            del host.adapter_scales[adapter_name]
            host.active = tuple(name for name in host.active if name != adapter_name)
        if adapter_name is None or not len(host.adapters):
            release(host)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merges the active adapters within the block, where the model is as fast as a plain one.

    The base weights are restored bit for bit. Costs a copy of the adapted weights. Adding,
    activating, scaling, merging or removing adapters within the block raises; blocks may nest.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    before = [(host, host.active, host.is_merged) for _, host in adapter_layers(model)]
    try:
        with torch.no_grad():
            for host, *_ in before:
                for parameter in host.adapted_parameters():
                    weight = base_parameter(host, parameter)
                    kept.append((weight, weight.data))
                    weight.data = compose(weight, host.parts(parameter))
        for host, *_ in before:
            host.active, host.is_merged = (), True
        yield
    finally:
        for weight, base in reversed(kept):
            weight.data = base
        for host, active, is_merged in before:
            host.active, host.is_merged = active, is_merged


class ComposedWeightCache:
    """Composes each weight once per optimizer step during gradient accumulation.

    Between :meth:`begin` and :meth:`finish`, forward passes share one composed weight, batches
    accumulate its gradient, and :meth:`finish` passes that on to the factors: the same gradients
    up to rounding, for one composition instead of one per batch. Costs the memory of the composed
    weights and their gradients. Methods with a low-rank forward keep it.

    Args:
        model: with adapters, in one process (the gradients bypass DDP's reduction).
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
                if parts := _composed_parts(host, parameter):
                    weight = compose(base_parameter(host, parameter), parts)
                    host.composed_weights[parameter] = weight.requires_grad_()

    def finish(self) -> None:
        """Adds the accumulated gradients to those of the factors."""
        self.open = False
        for _, host in adapter_layers(self.model):
            for parameter, weight in host.composed_weights.items():
                if weight.grad is not None:
                    parts = _composed_parts(host, parameter)
                    compose(base_parameter(host, parameter), parts).backward(weight.grad)
            host.composed_weights = {}


def _composed_parts(host: AdapterHost, parameter: str) -> list[ActiveAdapter]:
    return [part for part in host.parts(parameter) if not part.adapter.has_low_rank_forward]


def _require_hosts(model: nn.Module) -> list[tuple[str, AdapterHost]]:
    layers = list(adapter_layers(model))
    if not layers:
        raise VlkrError("the model carries no adapters; add_adapters first")
    return layers


def _refuse_merged(model: nn.Module, action: str) -> None:
    if any(host.is_merged for _, host in adapter_layers(model)):
        raise VlkrError(f"cannot {action} inside merged(model); leave its block first")
