from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from vlkr.errors import VlkrError

_MAX_LR = 1e30  # a step of AdamW beyond it is no fp32 number


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with a warm-up and a cosine schedule down to zero, stepped every iteration.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled, on adapter factors.
        warmup_steps: iterations of linear warm-up.
        grad_clip: largest gradient norm; 0 switches clipping off.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 0
    grad_clip: float = 1.0

    def check(self) -> None:
        """Raises :class:`VlkrError` for a number out of range."""
        if not 0 < self.lr <= _MAX_LR:
            raise VlkrError(
                f"optimizer.lr {self.lr} is out of range, expected above 0, at most {_MAX_LR:g}"
            )
        for option in ("weight_decay", "warmup_steps", "grad_clip"):
            value = getattr(self, option)
            if not 0 <= value < math.inf:
                raise VlkrError(f"optimizer.{option} {value} is out of range, expected at least 0")


def make_optimizer(
    parameters: Iterable[nn.Parameter], options: OptimizerOptions, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer and its per-step schedule."""
    optimizer = torch.optim.AdamW(
        list(parameters), lr=options.lr, weight_decay=options.weight_decay
    )

    def factor(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        decay_steps = max(1, total_steps - options.warmup_steps)
        progress = min(1.0, (step - options.warmup_steps) / decay_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
