from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter, random_basis
from vlkr.errors import VlkrError


class RandLoRA(Adapter):
    """Full-rank sum of scaled random bases (Albert et al., arXiv 2502.00987, eq. 3).

    With ``m <= M`` the sides of the weight and ``N = ceil(m / rank)``, the update is
    ``scaling * sum_n B_n @ diag(randlora_lambda_n) @ A @ diag(randlora_gamma_n)``, transposed when
    the longer side is the input. ``B_n (M, rank)`` and ``A (rank, m)`` are frozen, random, of unit
    variance, the same for all weights of a shape and not saved. ``randlora_lambda`` is initialized
    to zero, ``randlora_gamma`` to ``1 / M``. Composing costs as much as a product of ``m`` tokens.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        rank: rank of one basis; a smaller one means more bases and more parameters.
        alpha: numerator of the scaling ``alpha / rank``; None takes ``20 * rank``.
        seed: seed of the random bases.

    Raises:
        VlkrError: if ``rank`` is below 1.

    >>> RandLoRA.num_parameters(768, 768, rank=32)
    19200
    """

    budget_option = "rank"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 32,
        alpha: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(in_features, out_features)
        if rank < 1:
            raise VlkrError(f"RandLoRA rank {rank} is too small, expected at least 1")
        self.rank = rank
        self.alpha = alpha
        self.seed = seed
        self.scaling = 20.0 if alpha is None else alpha / rank
        short, long = sorted((in_features, out_features))
        bases = math.ceil(short / rank)
        self.randlora_lambda = nn.Parameter(torch.zeros(bases, rank))
        self.randlora_gamma = nn.Parameter(torch.full((bases, short), 1 / long))
        self.A: Tensor
        self.B: Tensor
        self.register_buffer("A", random_basis(rank, short, seed=seed), persistent=False)
        self.register_buffer("B", random_basis(long, bases, rank, seed=seed + 1), persistent=False)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns the scaled sum of random bases, ``(out_features, in_features)``."""
        left = (self.B * (self.scaling * self.randlora_lambda)).flatten(1)
        right = (self.A * self.randlora_gamma.unsqueeze(1)).flatten(0, 1)
        if self.out_features > self.in_features:
            return left @ right
        return right.T @ left.T
