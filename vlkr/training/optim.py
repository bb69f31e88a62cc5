from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from vlkr.config import OptimizerConfig


def make_optimizer(
    parameters: Iterable[nn.Parameter], options: OptimizerConfig, total_steps: int
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
