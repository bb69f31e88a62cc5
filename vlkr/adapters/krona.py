from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.errors import VlkrError
from vlkr.projections import project_kronecker


class KronA(Adapter):
    """Kronecker adapter, a sum of ``scale * kron(krona_A, krona_B)`` (arXiv 2212.10650, eq. 3).

    ``krona_A (terms, a1, a2)`` is initialized Kaiming-uniform, ``krona_B (terms, b1, b2)`` to zero;
    ``a1 * b1 = out_features`` and ``a2 * b2 = in_features``, where ``a1`` and ``a2`` are the
    largest divisors up to the square roots. The paper has one term.

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
    has_closed_form = True

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
        """Returns the scaled sum of Kronecker products, ``(out_features, in_features)``."""
        product = torch.einsum("tac,tbd->abcd", self.scale * self.krona_A, self.krona_B)
        return product.flatten(2, 3).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)`` by two small products per term."""
        a, b = (self.scale * self.krona_A).to(x.dtype), self.krona_B.to(x.dtype)
        grid = x.unflatten(-1, (a.shape[2], b.shape[2]))
        right = torch.einsum("...cd,tbd->...tcb", grid, b)
        return torch.einsum("tac,...tcb->...ab", a, right).flatten(-2)

    @torch.no_grad()
    def fit_to(self, delta: Tensor) -> None:
        """Sets the factors to the truncated SVD of the blocks (Van Loan and Pitsianis, 1993)."""
        left, right = project_kronecker(
            self._unscaled(delta, self.scale), self.krona_A.shape[1:], num_terms=self.num_terms
        )
        self.krona_A.copy_(left)
        self.krona_B.copy_(right)


def _divisor(n: int) -> int:
    return next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
