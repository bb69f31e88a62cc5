from __future__ import annotations

import torch
from torch import Tensor, nn

from vlkr.adapters.lora import LoRA


class DoRA(LoRA):
    """Weight-decomposed low-rank adapter (Liu et al., arXiv 2402.09353, eq. 5).

    The adapted weight is ``magnitude * V / |V|`` with ``V = weight + scaling * lora_B @ lora_A``
    and norms over ``in_features``. ``magnitude (out_features)`` is initialized to the base weight's
    norms. As in the paper's section 4.3, the norm of ``V`` is treated as constant in the gradient.
    There is no input dropout, since the norm is that of the whole weight.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        rank: inner size.
        alpha: numerator of the scaling; None takes ``rank``, a scaling of 1.
        use_rslora: divide ``alpha`` by ``sqrt(rank)`` and not ``rank``.

    >>> DoRA.num_parameters(768, 3072, rank=8) - LoRA.num_parameters(768, 3072, rank=8)
    3072
    """

    has_low_rank_forward = False
    has_closed_form = False
    needs_weight = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 16,
        alpha: float | None = None,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, rank=rank, alpha=alpha, use_rslora=use_rslora)
        self.magnitude = nn.Parameter(torch.ones(out_features))

    @torch.no_grad()
    def init_from_weight(self, weight: Tensor) -> None:
        """Sets ``magnitude`` to the norms of the base weight's rows."""
        self.magnitude.copy_(weight.to(self.magnitude.dtype).norm(dim=1))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns the adapted weight less the base weight, ``(out_features, in_features)``."""
        if weight is None:
            raise TypeError("DoRA's update depends on the base weight: delta(weight)")
        base = weight.to(self.magnitude.dtype)
        direction = base + super().delta()
        norm = direction.detach().norm(dim=1).clamp_min(torch.finfo(base.dtype).tiny)
        adapted: Tensor = (self.magnitude / norm).unsqueeze(1) * direction
        return adapted - base
