from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.errors import VlkrError


class KronA(Adapter):
    """Kronecker adapter, a sum of ``scale * kron(krona_A, krona_B)`` (arXiv 2212.10650, eq. 3).

    ``krona_A (terms, a1, a2)`` starts Kaiming-uniform and ``krona_B (terms, b1, b2)`` at zero,
    ``a1 * b1 = out_features``, ``a2 * b2 = in_features``, the ``a`` the largest divisors up to the
    square roots. The paper has one term.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        scale: multiplies the products.
        num_terms: Kronecker products that are summed.

    Raises:
        VlkrError: if ``num_terms`` is below 1.

    >>> KronA.num_parameters(768, 768)
    1600
    """

    budget_option = "num_terms"
    has_low_rank_forward = True

    def __init__(
        self, in_features: int, out_features: int, *, scale: float = 1.0, num_terms: int = 1
    ) -> None:
        super().__init__(in_features, out_features)
        if num_terms < 1:
            raise VlkrError(f"KronA num_terms {num_terms} is too small, expected at least 1")
        self.scale = scale
        self.num_terms = num_terms
        a1, a2 = _divisor(out_features), _divisor(in_features)
        self.krona_A = nn.Parameter(torch.empty(num_terms, a1, a2))
        self.krona_B = nn.Parameter(torch.zeros(num_terms, out_features // a1, in_features // a2))
        for term in self.krona_A:
            nn.init.kaiming_uniform_(term, a=math.sqrt(5))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """``(out_features, in_features)``; ignores ``weight``."""
        product = torch.einsum("tac,tbd->abcd", self.scale * self.krona_A, self.krona_B)
        return product.flatten(2, 3).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Two small products a term, ``(..., in_features)`` to ``(..., out_features)``."""
        a, b = (self.scale * self.krona_A).to(x.dtype), self.krona_B.to(x.dtype)
        grid = x.unflatten(-1, (a.shape[2], b.shape[2]))
        right = torch.einsum("...cd,tbd->...tcb", grid, b)
        return torch.einsum("tac,...tcb->...ab", a, right).flatten(-2)


def _divisor(n: int) -> int:
    return next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
