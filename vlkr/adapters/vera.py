from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkr.adapters.base import Adapter, random_basis
from vlkr.errors import VlkrError


class VeRA(Adapter):
    """Vector-based random matrix adaptation (Kopiczko et al., arXiv 2310.11454, eq. 2).

    ``delta = diag(vera_b) @ B @ diag(vera_d) @ A`` with frozen random ``A (rank, in_features)``
    and ``B (out_features, rank)``, Kaiming-scaled, the same for all weights of a shape and not
    saved. ``vera_b (out_features)`` is initialized to zero, ``vera_d (rank)`` to ``d_initial``.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        rank: inner size.
        d_initial: initial value of ``vera_d``.
        seed: seed of the random matrices.

    Raises:
        VlkrError: if ``rank`` is below 1.

    >>> VeRA.num_parameters(768, 3072, rank=256)
    3328
    """

    budget_option = "rank"
    has_low_rank_forward = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 256,
        d_initial: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(in_features, out_features)
        if rank < 1:
            raise VlkrError(f"VeRA rank {rank} is too small, expected at least 1")
        self.rank = rank
        self.d_initial = d_initial
        self.seed = seed
        self.vera_b = nn.Parameter(torch.zeros(out_features))
        self.vera_d = nn.Parameter(torch.full((rank,), d_initial))
        self.A: Tensor
        self.B: Tensor
        a = random_basis(rank, in_features, seed=seed) / math.sqrt(in_features)
        b = random_basis(out_features, rank, seed=seed + 1) / math.sqrt(rank)
        self.register_buffer("A", a, persistent=False)
        self.register_buffer("B", b, persistent=False)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns the scaled product of the frozen matrices, ``(out_features, in_features)``."""
        return self.vera_b.unsqueeze(1) * ((self.B * self.vera_d) @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the low-rank path, ``(..., in_features)`` to ``(..., out_features)``."""
        hidden = F.linear(x, self.A.to(x.dtype))
        y = F.linear(hidden * self.vera_d.to(hidden.dtype), self.B.to(hidden.dtype))
        return y * self.vera_b.to(y.dtype)
