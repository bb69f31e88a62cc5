"""Adding adapters to a model, merging them into it, taking them off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlkr.adapters.attention import AdaptedMultiheadAttention, AdaptedParameters, check_hostable
from vlkr.adapters.base import Adapter
from vlkr.adapters.linear import AdaptedLinear, AdapterHost, Slot, compose
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
    """Puts an adapter on every chosen weight and freezes everything else.

    The model computes what it did before until the adapters are trained. Modules keep their
    identity and state-dict keys; the adapters' own keys contain ``.adapters.``.

    Args:
        model: any module, changed in place.
        method: ``"kradapter"``, ``"lora"``, ...
        targets: short names (``q k v qkv out fc1 fc2``) or shell patterns of module names.
        towers: ``"visual"``, ``"text"`` or both; a model without towers matches always.
        blocks: indices of transformer blocks, negative from the end; None for all.
        adapter_name: under which the adapters are kept in the modules.
        **options: of the method, as its class lists them.

    Returns:
        The weights that were matched.

    Raises:
        VlkrError: for an unknown method, option, tower or block, or a target that matches nothing.
    """
    check_options(method, options)
    found = find_targets(model, targets, towers, blocks)
    if blocks is None:
        warn_of_untouched(model, found, targets, towers)
    cls = adapter_class(method)
    if cls.adapts_bias:
        found = bias_targets(model, found)
    made = [(t, cls(t.in_features, t.out_features, **options)) for t in found]
    modules = dict(model.named_modules())
    for target, adapter in made:
        weight = modules[target.module].get_parameter(target.slot.parameter)
        adapter.start(target.slot.select(weight))
    attach(model, made, adapter_name)
    return found


def attach(
    model: nn.Module, made: Sequence[tuple[Target, Adapter]], adapter_name: str = "default"
) -> None:
    """Puts ready adapters on their targets, puts them alone to work and freezes everything else.

    Raises:
        VlkrError: if the name is taken, or a target cannot carry its adapter.
    """
    if any(adapter_name in host.adapters for _, host in hosts(model)):
        raise VlkrError(
            f"the model carries adapters named {adapter_name!r} already; merge or remove them first"
        )
    if not adapter_name.isidentifier() or hasattr(nn.ModuleDict, adapter_name):
        raise VlkrError(f"{adapter_name!r} is no name for adapters, expected letters, digits and _")
    modules = dict(model.named_modules())
    owners: dict[int, Target] = {}
    for target, adapter in made:
        module = modules[target.module]
        weight = module.get_parameter(target.slot.parameter)
        first = owners.setdefault(id(weight), target)
        if (first.module, first.slot.parameter) != (target.module, target.slot.parameter):
            raise VlkrError(
                f"{first.path} and {target.path} share one weight; adapt only one of them"
            )
        host_class = _host_class(module)
        if issubclass(host_class, AdaptedParameters) and getattr(adapter, "dropout", False):
            raise VlkrError(
                f"{target.module} ({type(module).__name__}) composes its weights, so dropout on "
                "the adapter's input is not possible there; use dropout 0"
            )
    for p in model.parameters():
        p.requires_grad_(False)
    for target, adapter in made:
        host = _become_host(modules[target.module])
        weight = host.get_parameter(target.slot.parameter)
        host.slots[target.slot_name] = target.slot
        if adapter_name not in host.adapters:
            host.adapters[adapter_name] = nn.ModuleDict()
            host.adapter_scales[adapter_name] = 1.0
            host.active = (adapter_name,)
        host.adapters[adapter_name][target.slot_name] = adapter.to(weight.device)  # type: ignore[operator]
        host.adapters.train(host.training)
    use_adapters(model, adapter_name)


def hosts(model: nn.Module) -> Iterator[tuple[str, AdapterHost]]:
    """The modules that carry adapters, with their qualified names."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterHost):
            yield path, module


@dataclass(frozen=True)
class Placed:
    """An adapter in its place: the host's qualified name, the slot and what sits there.

    Its change counts ``scale`` times.
    """

    module: str
    name: str
    slot: Slot
    adapter: Adapter
    scale: float

    @property
    def key(self) -> str:
        """Prefix of this adapter's tensors in an adapter file: ``visual...attn.q``."""
        return f"{self.module}.{self.name}".lstrip(".")


def placed_adapters(model: nn.Module, adapter_name: str = "default") -> list[Placed]:
    """All adapters of one name, in the model's order.

    Raises:
        VlkrError: if the model carries none of that name.
    """
    placed = [
        Placed(path, name, host.slots[name], adapter, host.adapter_scales[adapter_name])
        for path, host in hosts(model)
        if adapter_name in host.adapters
        for name, adapter in host.adapters[adapter_name].items()  # type: ignore[operator]
    ]
    if not placed:
        raise VlkrError(f"the model carries no adapters named {adapter_name!r}; add_adapters first")
    return placed


def use_adapters(model: nn.Module, *names: str) -> None:
    """Puts the adapters of these names to work, and no others; without a name, the base model.

    They alone are trained from now on. The base weights are not touched.

    Raises:
        VlkrError: for a name that the model does not carry.
    """
    for name in names:
        placed_adapters(model, name)
    for _, host in hosts(model):
        host.active = tuple(name for name in host.adapters if name in names)
        for name, adapters in host.adapters.items():
            adapters.requires_grad_(name in names)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapters at work, those that training changes."""
    return [p for _, host in hosts(model) for p in host.adapters.parameters() if p.requires_grad]


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The adapters' tensors by ``<module>.<slot>.<factor>``, detached."""
    return {
        f"{placed.key}.{factor}": tensor.detach()
        for placed in placed_adapters(model, adapter_name)
        for factor, tensor in placed.adapter.state_dict().items()
    }


def set_adapter_scale(model: nn.Module, scale: float, adapter_name: str = "default") -> None:
    """Scales every change of one adapter: 0 is the base model, 1 the adapted one.

    Along the way lies WiSE-FT's interpolation (arXiv 2109.01903).
    """
    placed_adapters(model, adapter_name)
    for _, host in hosts(model):
        if adapter_name in host.adapters:
            host.adapter_scales[adapter_name] = float(scale)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Adds the changes of the adapters at work to the weights, in fp32, and takes all adapters off.

    The model is plain again: the same classes and state-dict keys as before :func:`add_adapters`.
    """
    for _, host in _require_hosts(model):
        for parameter in host.adapted_parameters():
            weight = host.get_parameter(parameter)
            weight.copy_(compose(weight, host.parts(parameter)))
        _release(host)


def remove_adapters(model: nn.Module, adapter_name: str | None = None) -> None:
    """Takes the adapters off; the model is what it was before :func:`add_adapters`, bit for bit.

    Args:
        model: with adapters.
        adapter_name: take off those of this name and leave the others; None for all.

    Raises:
        VlkrError: if there are none.
    """
    if adapter_name is not None:
        placed_adapters(model, adapter_name)
    for _, host in _require_hosts(model):
        if adapter_name is not None and adapter_name in host.adapters:
            del host.adapters[adapter_name]
            del host.adapter_scales[adapter_name]
            host.active = tuple(name for name in host.active if name != adapter_name)
        if adapter_name is None or not len(host.adapters):
            _release(host)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within the block the adapted weights are in place, as fast as the plain model.

    The base weights come back afterwards, bit for bit. Costs a copy of the adapted weights.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    at_work = [(host, host.active) for _, host in hosts(model)]
    try:
        with torch.no_grad():
            for host, _ in at_work:
                for parameter in host.adapted_parameters():
                    weight = host.get_parameter(parameter)
                    kept.append((weight, weight.data))
                    weight.data = compose(weight, host.parts(parameter))
        for host, _ in at_work:
            host.active, host.is_merged = (), True
        yield
    finally:
        for weight, base in reversed(kept):
            weight.data = base
        for host, names in at_work:
            host.active, host.is_merged = names, False


def _require_hosts(model: nn.Module) -> list[tuple[str, AdapterHost]]:
    found = list(hosts(model))
    if not found:
        raise VlkrError("the model carries no adapters; add_adapters first")
    return found


def _host_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    if isinstance(module, AdapterHost):
        return cls
    host: type[nn.Module] = AdaptedParameters
    if isinstance(module, nn.MultiheadAttention):
        check_hostable(module)
        if module._qkv_same_embed_dim and cls.forward is nn.MultiheadAttention.forward:
            host = AdaptedMultiheadAttention
    elif isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward:
        host = AdaptedLinear
    if cls in (nn.Linear, nn.MultiheadAttention) and host is not AdaptedParameters:
        return host
    return type(f"Adapted{cls.__name__}", (host, cls), {})


def _become_host(module: nn.Module) -> AdapterHost:
    if not isinstance(module, AdapterHost):
        base_class, module.__class__ = type(module), _host_class(module)
        assert isinstance(module, AdapterHost)
        module.base_class = base_class
        module.adapters = nn.ModuleDict()
        module.slots = {}
        module.adapter_scales = {}
        module.active = ()
        module.composed_once = {}
        module.is_merged = False
        module.hook = module.register_forward_pre_hook(_no_op)
    return module


def _no_op(module: nn.Module, args: object) -> None:
    """A module with hooks is called, and not read by torch's fused encoder layer."""


def _release(host: AdapterHost) -> None:
    base_class = host.base_class
    host.hook.remove()
    for attribute in AdapterHost.__annotations__:
        delattr(host, attribute)
    host.__class__ = base_class  # type: ignore[assignment]
