"""Module classes that carry adapters; a module keeps its identity and parameter names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlkr.adapters.base import Adapter
from vlkr.adapters.compose import ActiveAdapter, Slot, adapted_linear, base_parameter, compose
from vlkr.errors import VlkrError


class AdapterHost(nn.Module):
    """Mixed into the class of a module while it carries adapters.

    The module keeps its identity, its parameters and their names; only its class changes, and
    removing the adapters restores it. A forward pass writes no attribute.

    Attributes:
        adapters: the adapters, by adapter name and slot name.
        slots: positions in this module, by slot name.
        adapter_scales: scale of all updates, by adapter name.
        active: names of the active adapters.
        composed_weights: weights shared by the batches of one optimizer step.
        base_class: class to restore.
        is_merged: the updates are in the weights, within :func:`merged`.
        hook: a no-op that keeps torch's fused encoder layer from bypassing this module.
    """

    adapters: nn.ModuleDict
    slots: dict[str, Slot]
    adapter_scales: dict[str, float]
    active: tuple[str, ...]
    composed_weights: dict[str, Tensor]
    base_class: type[nn.Module]
    is_merged: bool
    hook: RemovableHandle

    def parts(self, parameter: str) -> list[ActiveAdapter]:
        """Returns the active adapters of ``parameter``, by its name in this module."""
        return [
            ActiveAdapter(cast(Adapter, adapter), self.slots[slot], self.adapter_scales[name])
            for name in self.active
            if self.adapter_scales[name] != 0
            for slot, adapter in cast(nn.ModuleDict, self.adapters[name]).items()
            if self.slots[slot].parameter == parameter
        ]

    def operands(self, parameter: str) -> tuple[Tensor, list[ActiveAdapter]]:
        """Returns the weight to start from, and the active adapters not included in it yet."""
        parts = self.parts(parameter)
        if parameter in self.composed_weights:
            low_rank = [part for part in parts if part.adapter.has_low_rank_forward]
            return self.composed_weights[parameter], low_rank
        return base_parameter(self, parameter), parts

    def adapted_parameter(self, path: str) -> Tensor:
        """Returns the weight with the updates of its active adapters."""
        weight, parts = self.operands(path)
        return compose(weight, parts) if parts else weight

    def adapted_bias(self, path: str) -> Tensor | None:
        """Returns the bias with its updates, None if the module has none."""
        owner, _, name = path.rpartition(".")
        if self.get_submodule(owner)._parameters.get(name) is None:
            return None
        return self.adapted_parameter(path)

    def adapted_parameters(self) -> list[str]:
        """Returns the names of the parameters that carry an adapter."""
        return list(dict.fromkeys(slot.parameter for slot in self.slots.values()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies by the base class, since a host's class may be made at run time."""
        return _reduced(self)


class AdaptedLinear(AdapterHost, nn.Linear):
    """:class:`torch.nn.Linear` with adapters on its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)``."""
        weight, parts = self.operands("weight")
        return adapted_linear(x, weight, self.adapted_bias("bias"), parts)


class AdaptedMultiheadAttention(AdapterHost, nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with adapters on ``in_proj_weight`` and ``out_proj``.

    Self-attention projects q, k and v in one product with the composed fused weight.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes the arguments of :meth:`torch.nn.MultiheadAttention.forward`.

        There ``is_causal`` is only a hint that comes with a mask; the mask decides.

        Args:
            query: ``(N, L, E)`` when ``batch_first``, else ``(L, N, E)``; ``(L, E)`` without batch.
            key: as ``query``, of length ``S``.
            value: as ``key``.
            key_padding_mask: ``(N, S)``, True or -inf where a key is ignored.
            need_weights: also return the attention weights.
            attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``, True or -inf where ignored.
            average_attn_weights: average the weights over the heads.
            is_causal: a hint that ``attn_mask`` is causal.

        Returns:
            The output, of ``query``'s shape, and the weights ``(N, L, S)``,
            ``(N, num_heads, L, S)`` or None.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        same = query is key and key is value
        batched = query.dim() == 3

        def batch_first(x: Tensor) -> Tensor:
            if not batched:
                return x.unsqueeze(0)
            return x if self.batch_first else x.transpose(0, 1)

        if same:
            q, k, v = self._project(batch_first(query), None).chunk(3, dim=-1)
        else:
            width = self.embed_dim
            q, k, v = (
                self._project(batch_first(x), (i * width, (i + 1) * width))
                for i, x in enumerate((query, key, value))
            )
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = self._merge_masks(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = F.dropout(weights, dropout)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        weight, parts = self.operands("out_proj.weight")
        bias = self.adapted_bias("out_proj.bias")
        out = adapted_linear(attended.transpose(1, 2).flatten(2), weight, bias, parts)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, x: Tensor, rows: tuple[int, int] | None) -> Tensor:
        """Applies the adapted fused weight, or some of its rows, to ``x``."""
        weight, parts = self.operands("in_proj_weight")
        bias = self.adapted_bias("in_proj_bias")
        if rows is None:
            return adapted_linear(x, weight, bias, parts)
        if any(part.slot.rows is None for part in parts):
            return adapted_linear(x, weight, bias, parts)[..., slice(*rows)]
        own = [
            part._replace(slot=part.slot._replace(rows=None))
            for part in parts
            if part.slot.rows == rows
        ]
        bias = None if bias is None else bias[slice(*rows)]
        return adapted_linear(x, weight[slice(*rows)], bias, own)

    def _merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
    ) -> Tensor | None:
        """Returns one additive mask that broadcasts to ``(N, num_heads, L, S)``."""
        merged = None
        if attn_mask is not None:
            merged = _additive(attn_mask, q.dtype)
            if merged.dim() == 3:
                merged = merged.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[..., None, None, :]
            merged = padding if merged is None else merged + padding
        return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


class AdaptedModule(AdapterHost):
    """Any other module: reading an adapted parameter gives the composed weight.

    For attention classes that are not :class:`torch.nn.MultiheadAttention` but keep its parameter
    names. Their own ``forward`` runs; the base weights are never written to.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in self._parameters and name in self.adapted_parameters():
            return self.adapted_parameter(name)
        return value


class AdaptedChild(nn.Module):
    """Mixed into a child of an :class:`AdaptedModule` whose parameters carry its adapters.

    Attributes:
        adapter_host: the host, and this module's path in it.
        base_class: class to restore.
    """

    adapter_host: tuple[AdapterHost, str]
    base_class: type[nn.Module]

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in self._parameters:
            host, path = self.adapter_host
            if f"{path}.{name}" in host.adapted_parameters():
                return host.adapted_parameter(f"{path}.{name}")
        return value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies by the base class, since this class is made at run time."""
        return _reduced(self)


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _mixed(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Returns the one class that mixes a host into a base class."""
    if issubclass(mixin, cls):
        return mixin
    if (mixin, cls) not in _CLASSES:
        _CLASSES[mixin, cls] = type(f"Adapted{cls.__name__}", (mixin, cls), {})
    return _CLASSES[mixin, cls]


def _reduced(module: AdapterHost | AdaptedChild) -> tuple[Any, ...]:
    cls = type(module)
    mixin = cls if cls in (AdaptedLinear, AdaptedMultiheadAttention) else cls.__bases__[0]
    return _empty, (mixin, module.base_class), module.__dict__.copy()


def _empty(mixin: type[nn.Module], base_class: type[nn.Module]) -> nn.Module:
    cls = _mixed(mixin, base_class)
    return cls.__new__(cls)


def host_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a module once it carries adapters.

    Raises:
        VlkrError: for settings of attention that no CLIP has.
    """
    cls = type(module)
    if isinstance(module, AdapterHost):
        return cls
    mixin: type[nn.Module] = AdaptedModule
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None or module.add_zero_attn:
            raise VlkrError(
                "nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot carry adapters"
            )
        if module._qkv_same_embed_dim and cls.forward is nn.MultiheadAttention.forward:
            mixin = AdaptedMultiheadAttention
    elif isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward:
        mixin = AdaptedLinear
    return _mixed(mixin, cls)


def become_host(module: nn.Module) -> AdapterHost:
    """Gives a module the class that carries adapters.

    Raises:
        VlkrError: if the module has an attribute that a host needs.
    """
    if isinstance(module, AdapterHost):
        return module
    for name in AdapterHost.__annotations__:
        if hasattr(module, name):
            raise VlkrError(
                f"{type(module).__name__} has an attribute {name!r} of its own, so it cannot carry "
                "adapters"
            )
    base_class, module.__class__ = type(module), host_class(module)
    assert isinstance(module, AdapterHost)
    module.slots = {}
    module.base_class = base_class
    module.adapters = nn.ModuleDict()
    module.adapter_scales = {}
    module.active = ()
    module.composed_weights = {}
    module.is_merged = False
    module.hook = module.register_forward_pre_hook(_no_op)
    return module


def add_slot(host: AdapterHost, name: str, slot: Slot) -> None:
    """Makes a position for an adapter in a host."""
    host.slots[name] = slot
    owner, _, _ = slot.parameter.rpartition(".")
    child = host.get_submodule(owner)
    if not owner or not isinstance(host, AdaptedModule) or isinstance(child, AdaptedChild):
        return
    base_class, child.__class__ = type(child), _mixed(AdaptedChild, type(child))
    child.adapter_host = (host, owner)  # type: ignore[assignment]  # a tuple registers no module
    child.base_class = base_class  # type: ignore[assignment]


def release(host: AdapterHost) -> None:
    """Takes all adapters off a host, which gets its class back."""
    for child in list(host.modules()):
        if isinstance(child, AdaptedChild) and child.adapter_host[0] is host:
            base_class = child.base_class
            del child.adapter_host, child.base_class
            child.__class__ = base_class  # type: ignore[assignment]
    base_class = host.base_class
    host.hook.remove()
    for attribute in AdapterHost.__annotations__:
        delattr(host, attribute)
    host.__class__ = base_class  # type: ignore[assignment]


def _no_op(module: nn.Module, args: object) -> None:
    """A module with hooks is called, not read by torch's fused encoder layer."""


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterHost]]:
    """Yields the modules that carry adapters, with their qualified names."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterHost):
            yield path, module


def is_adapter_key(model: nn.Module) -> Callable[[str], bool]:
    """Returns whether a state-dict key of the model belongs to an adapter."""
    prefixes = tuple(f"{path}.adapters.".lstrip(".") for path, _ in adapter_layers(model))
    return lambda key: key.startswith(prefixes)


def weights_hash(model: nn.Module, *, without: str | None = None) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes of the base weights.

    Persistent buffers count, adapters do not: the hash is the same before and after
    :func:`vlkr.add_adapters`.

    Args:
        model: any module.
        without: name of a child module that does not count either.
    """
    digest = hashlib.sha256()
    is_adapter = is_adapter_key(model)
    for key, tensor in sorted(model.state_dict().items()):
        if is_adapter(key) or (without and key.startswith(f"{without}.")):
            continue
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{key}|{data.dtype}|{tuple(data.shape)}|".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
