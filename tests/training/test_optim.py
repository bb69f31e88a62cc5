import math

import pytest
import torch
from torch import nn

from vlkr.config import OptimizerConfig
from vlkr.training.module import make_optimizer


def rates(options, total_steps, steps=None):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer, schedule = make_optimizer([parameter], options, total_steps)
    found = []
    for _ in range(steps or total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_cosine_falls_from_the_peak_to_zero():
    found = rates(OptimizerConfig(lr=0.2), 8)
    expected = [0.1 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_warm_up_is_linear():
    found = rates(OptimizerConfig(lr=1.0, warmup_steps=4), 12)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[5:] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(1, 9)], abs=1e-12
    )


def test_schedule_stays_at_zero_and_survives_a_long_warm_up():
    assert rates(OptimizerConfig(lr=1.0), 2, steps=5)[2:] == pytest.approx([0] * 4, abs=1e-12)
    assert rates(OptimizerConfig(lr=1.0, warmup_steps=9), 3) == pytest.approx(
        [1 / 9, 2 / 9, 3 / 9, 4 / 9]
    )


def test_decay_is_decoupled():
    parameter = nn.Parameter(torch.ones(2))
    optimizer, _ = make_optimizer([parameter], OptimizerConfig(lr=0.1, weight_decay=0.5), 10)
    parameter.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 1 - 0.1 * 0.5))
