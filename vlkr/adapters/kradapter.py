from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.errors import VlkrError
from vlkr.functional import add_khatri_rao, khatri_rao, khatri_rao_gradients
from vlkr.projections import project_kradapter


class KRAdapter(Adapter):
    """Khatri-Rao product adapter: an update of full effective rank from two thin factors.

    With ``m <= M`` the sides of the weight and factors ``u (m, k1)``, ``v (m, k2)``,
    ``k1 * k2 >= M``, the update is ``scale`` times the first ``M`` columns of the row-wise
    Khatri-Rao product of ``u`` and ``v``, transposed if ``out_features > in_features``. ``u`` is
    initialized to zero. Albert et al., "Towards Higher Effective
    Rank in Parameter-efficient Fine-tuning using Khatri-Rao Product", ICCV 2025,
    arXiv 2508.00230.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        scale: multiplies the product (the authors' default for models is 2).
        rule: ``"reference"`` is the authors' layer, ``k1 = isqrt(m)``, ``v`` Kaiming-uniform with
            ``a=5``. ``"balanced"`` is the authors' matrix benchmark, ``k1 = isqrt(M)``,
            ``a=sqrt(5)`` and the factors' roles in a row swapped; it has nearly the fewest
            parameters. In both, ``k2 = ceil(M / k1)``.
        num_terms: number of products that are summed; more parameters (not in the paper).
        num_factors: 2, or 3 factors of about ``M ** (1 / 3)`` columns; fewer parameters (not in
            the paper). The third is initialized with unit variance, which keeps the update's scale.

    Raises:
        VlkrError: for an unknown ``rule``, ``num_terms`` below 1, or ``num_factors`` not 2 or 3.

    >>> KRAdapter(768, 768).delta().shape, KRAdapter.num_parameters(768, 768)
    (torch.Size([768, 768]), 43008)
    """

    budget_option = "num_terms"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: float = 2.0,
        rule: Literal["reference", "balanced"] = "reference",
        num_terms: int = 1,
        num_factors: int = 2,
    ) -> None:
        super().__init__(in_features, out_features)
        if rule not in ("reference", "balanced"):
            raise VlkrError(f"unknown KRAdapter rule {rule!r}, expected 'reference' or 'balanced'")
        if num_terms < 1:
            raise VlkrError(f"KRAdapter num_terms {num_terms} is too small, expected at least 1")
        if num_factors not in (2, 3):
            raise VlkrError(f"KRAdapter num_factors {num_factors} is not possible, expected 2 or 3")
        self.scale = scale
        self.rule = rule
        self.num_terms = num_terms
        self.num_factors = num_factors
        self.has_factor_gradients = self.has_closed_form = num_factors == 2
        short, long = sorted((in_features, out_features))
        sizes = _factor_sizes(short, long, rule, num_factors)
        self.u = nn.Parameter(torch.zeros(num_terms, short, sizes[0]))
        self.v = nn.Parameter(torch.empty(num_terms, short, sizes[1]))
        for term in self.v:
            nn.init.kaiming_uniform_(term, a=5 if rule == "reference" else math.sqrt(5))
        self.w: nn.Parameter | None = None
        if num_factors == 3:
            self.w = nn.Parameter(torch.empty(num_terms, short, sizes[2]))
            nn.init.uniform_(self.w, -math.sqrt(3), math.sqrt(3))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns the scaled sum of Khatri-Rao products, ``(out_features, in_features)``."""
        factors = [self.scale * self.u, self.v]
        if self.w is not None:
            factors.append(self.w)
        if self.rule == "balanced":
            factors.reverse()
        tall = self.out_features > self.in_features
        product = factors[0].mT if tall else factors[0]
        for factor in factors[1:]:
            product = (
                _khatri_rao_columns(product, factor.mT) if tall else khatri_rao(product, factor)
            )
        summed = product[0] if self.num_terms == 1 else product.sum(0)
        return summed[: self.out_features, : self.in_features]

    def add_delta(self, weight: Tensor, base: Tensor, scale: float, out: Tensor) -> None:
        """Computes product and sum in one pass over the weight."""
        if not self.has_factor_gradients:
            super().add_delta(weight, base, scale, out)
            return
        for u, v in zip(self.u, self.v, strict=True):
            factors = (v, u) if self.rule == "balanced" else (u, v)
            add_khatri_rao(self._rows(base), *factors, self.scale * scale, self._rows(out))
            base = out

    def factor_gradients(self, grad_delta: Tensor) -> dict[str, Tensor]:
        """Multiplies the rows of the update's gradient by the factors."""
        grads: dict[str, list[Tensor]] = {"u": [], "v": []}
        for u, v in zip(self.u, self.v, strict=True):
            names, factors = ("uv", (u, v)) if self.rule == "reference" else ("vu", (v, u))
            pair = khatri_rao_gradients(self._rows(grad_delta), *factors)
            for name, grad in zip(names, pair, strict=True):
                grads[name].append(grad)
        return {name: torch.stack(terms).mul_(self.scale) for name, terms in grads.items()}

    @torch.no_grad()
    def fit_to(self, delta: Tensor) -> None:
        """Sets two factors to the truncated SVDs of the rows, see :func:`project_kradapter`."""
        inner, outer = (self.u, self.v) if self.rule == "reference" else (self.v, self.u)
        fast, slow = project_kradapter(
            self._unscaled(delta, self.scale), inner.shape[-1], num_terms=self.num_terms
        )
        inner.copy_(fast)
        outer.copy_(slow)

    def _rows(self, matrix: Tensor) -> Tensor:
        """Returns the matrix as ``(short, long)``."""
        return matrix.T if self.out_features > self.in_features else matrix


def _khatri_rao_columns(u: Tensor, v: Tensor) -> Tensor:
    """Column-wise product of ``(..., k1, m)`` and ``(..., k2, m)``, ``(..., k1 * k2, m)``.

    The transpose of the row-wise one, in the memory layout of a tall weight.
    """
    return (v.unsqueeze(-2) * u.unsqueeze(-3)).flatten(-3, -2)


def _factor_sizes(short: int, long: int, rule: str, num_factors: int) -> list[int]:
    if num_factors == 2:
        first = math.isqrt(short if rule == "reference" else long)
        return [first, math.ceil(long / first)]
    first = max(1, round(long ** (1 / 3)))
    second = math.ceil(math.sqrt(long / first))
    return [first, second, math.ceil(long / (first * second))]
