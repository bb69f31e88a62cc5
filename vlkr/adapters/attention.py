"""Hosts of adapters on attention with a fused input projection."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkr.adapters.linear import AdapterHost, adapted_linear, compose
from vlkr.errors import VlkrError


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
        """As :meth:`torch.nn.MultiheadAttention.forward`, argument for argument.

        ``is_causal`` is a hint there that comes with a mask, and the mask is what counts.

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
        """``x`` times the adapted fused weight, or times some of its rows."""
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
        """One additive mask that broadcasts to ``(N, num_heads, L, S)``."""
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


class AdaptedParameters(AdapterHost):
    """Mixed into any other module: its own ``forward`` runs with the composed weights in place.

    The way for attention classes that are not :class:`torch.nn.MultiheadAttention` but keep its
    parameter names. The base weights are never written to.
    """

    def forward(self, *args: object, **kwargs: object) -> object:
        """As the base class's."""
        swapped: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
        try:
            for path in self.adapted_parameters():
                owner, _, name = path.rpartition(".")
                parameters = self.get_submodule(owner)._parameters
                base = parameters[name]
                assert base is not None
                weight, parts = self.operands(path)
                composed = compose(weight, parts) if parts else weight
                parameters[name] = composed  # type: ignore[assignment]
                swapped.append((parameters, name, base))
            return super().forward(*args, **kwargs)
        finally:
            for parameters, name, base in swapped:
                parameters[name] = base


def check_hostable(module: nn.MultiheadAttention) -> None:
    """Raises :class:`VlkrError` for settings of attention that no CLIP has."""
    if module.bias_k is not None or module.add_zero_attn:
        raise VlkrError(
            "nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot carry adapters"
        )
