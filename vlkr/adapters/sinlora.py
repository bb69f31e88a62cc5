from __future__ import annotations

import math

import torch
from torch import Tensor

from vlkr.adapters.lora import LoRA


class SinLoRA(LoRA):
    """Low-rank adapter under a sine, ``sin(frequency * lora_B @ lora_A) / gain``.

    The sine raises the rank without more parameters (Ji et al., arXiv 2403.19243, eq. 4). There is
    no input dropout, since the sine is that of the whole update.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        rank: inner size.
        frequency: multiplies the sine's argument.
        gain: divides the sine; None takes ``sqrt(in_features)``.

    >>> SinLoRA.num_parameters(768, 3072, rank=8)
    30720
    """

    has_low_rank_forward = False
    has_closed_form = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 16,
        frequency: float = 200.0,
        gain: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank=rank)
        self.frequency = frequency
        self.gain = gain

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns the sine of the product over ``gain``, ``(out_features, in_features)``."""
        gain = math.sqrt(self.in_features) if self.gain is None else self.gain
        return torch.sin(self.frequency * (self.lora_B @ self.lora_A)) / gain
