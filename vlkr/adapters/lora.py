from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.errors import VlkrError
from vlkr.projections import project_lora


class LoRA(Adapter):
    """Low-rank adapter, ``delta = scaling * lora_B @ lora_A`` (Hu et al., arXiv 2106.09685, eq. 3).

    ``lora_A (rank, in_features)`` is initialized Kaiming-uniform, ``lora_B (out_features, rank)``
    to zero.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        rank: inner size.
        alpha: numerator of the scaling; None takes ``rank``, a scaling of 1.
        use_rslora: divide ``alpha`` by ``sqrt(rank)`` and not ``rank`` (rsLoRA, arXiv 2312.03732).
        dropout: probability of dropping an input of the low-rank path in training.

    Raises:
        VlkrError: if ``rank`` is below 1, or ``dropout`` is not a probability below 1.

    >>> LoRA(768, 3072, rank=8).delta().shape, LoRA.num_parameters(768, 3072, rank=8)
    (torch.Size([3072, 768]), 30720)
    """

    budget_option = "rank"
    has_low_rank_forward = True
    has_closed_form = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 16,
        alpha: float | None = None,
        use_rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features)
        if rank < 1:
            raise VlkrError(f"LoRA rank {rank} is too small, expected at least 1")
        if not 0 <= dropout < 1:
            raise VlkrError(f"LoRA dropout {dropout} is out of range, expected 0 <= dropout < 1")
        self.rank = rank
        self.alpha = alpha
        self.use_rslora = use_rslora
        self.dropout = dropout
        self.scaling = (rank if alpha is None else alpha) / (
            math.sqrt(rank) if use_rslora else rank
        )
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns ``scaling * lora_B @ lora_A``, ``(out_features, in_features)``."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the low-rank path, ``(..., in_features)`` to ``(..., out_features)``."""
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(
            F.linear(x, self.lora_A.to(x.dtype)), self.scaling * self.lora_B.to(x.dtype)
        )

    @torch.no_grad()
    def fit_to(self, delta: Tensor) -> None:
        """Sets the factors to the truncated SVD of ``delta`` (Eckart and Young, 1936)."""
        lora_a, lora_b = project_lora(self._unscaled(delta, self.scaling), self.rank)
        self.lora_A.copy_(lora_a)
        self.lora_B.copy_(lora_b)
