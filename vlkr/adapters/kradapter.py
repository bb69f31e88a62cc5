from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.errors import VlkrError
from vlkr.functional import khatri_rao


class KRAdapter(Adapter):
    """Khatri-Rao product adapter: a change of full effective rank from two thin factors.

    With ``m <= M`` the sides of the weight and factors ``u (m, k1)``, ``v (m, k2)``,
    ``k1 * k2 >= M``, the change is ``scale`` times the first ``M`` columns of the row-wise
    Khatri-Rao product of ``u`` and ``v``, transposed when ``out_features > in_features``.
    ``u`` starts at zero, so the model starts unchanged. Albert et al., "Towards Higher Effective
    Rank in Parameter-efficient Fine-tuning using Khatri-Rao Product", ICCV 2025,
    arXiv 2508.00230.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        scale: multiplies the product (the authors' default for models is 2).
        rule: ``"reference"`` is the authors' layer, ``k1 = isqrt(m)``, ``v`` Kaiming-uniform with
            ``a=5``. ``"balanced"`` is the authors' matrix benchmark, ``k1 = isqrt(M)``,
            ``a=sqrt(5)`` and the factors' roles in a row swapped; it has nearly the fewest
            parameters. Both take ``k2 = ceil(M / k1)``.

    Raises:
        VlkrError: for an unknown ``rule``.

    >>> KRAdapter(768, 768).delta().shape, KRAdapter.num_parameters(768, 768)
    (torch.Size([768, 768]), 43008)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: float = 2.0,
        rule: Literal["reference", "balanced"] = "reference",
    ) -> None:
        super().__init__(in_features, out_features)
        if rule not in ("reference", "balanced"):
            raise VlkrError(f"unknown KRAdapter rule {rule!r}, expected 'reference' or 'balanced'")
        self.scale = scale
        self.rule = rule
        short, long = sorted((in_features, out_features))
        k1 = math.isqrt(short if rule == "reference" else long)
        k2 = math.ceil(long / k1)
        self.u = nn.Parameter(torch.zeros(short, k1))
        self.v = nn.Parameter(torch.empty(short, k2))
        nn.init.kaiming_uniform_(self.v, a=5 if rule == "reference" else math.sqrt(5))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The scaled Khatri-Rao product, ``(out_features, in_features)``; ignores ``weight``."""
        inner, outer = (self.u, self.v) if self.rule == "reference" else (self.v, self.u)
        product = khatri_rao(inner, outer)[:, : max(self.in_features, self.out_features)]
        delta = self.scale * product
        return delta if self.out_features <= self.in_features else delta.T
