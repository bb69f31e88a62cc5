from __future__ import annotations

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter


class Full(Adapter):
    """Full fine-tuning: the update itself is trained, from zero.

    Weight decay pulls the weight toward the base weight.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.

    >>> Full.num_parameters(768, 768)
    589824
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.change = nn.Parameter(torch.zeros(out_features, in_features))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns the update, ``(out_features, in_features)``."""
        return self.change


class BitFit(Adapter):
    """Trains only the bias (Ben Zaken et al., arXiv 2106.10199).

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight, and length of the bias.

    >>> BitFit.num_parameters(768, 3072)
    3072
    """

    adapts_bias = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.change = nn.Parameter(torch.zeros(out_features))

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns the update of the bias, ``(out_features)``."""
        return self.change
