import math

import pytest
import torch

from vlkr.adapters import LoRA
from vlkr.errors import VlkrError


def trained(*sizes, **options):
    adapter = LoRA(*sizes, **options)
    for p in adapter.parameters():
        p.data.normal_()
    return adapter


@pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (12, 6), (6, 12)])
@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1.0),
        ({"alpha": 8.0}, 2.0),
        ({"alpha": 8.0, "use_rslora": True}, 4.0),
        ({"use_rslora": True}, 2.0),
        ({"alpha": 0.0}, 0.0),
    ],
)
def test_delta_is_the_scaled_product(in_features, out_features, options, scaling):
    adapter = trained(in_features, out_features, rank=4, **options)
    expected = scaling * adapter.lora_B @ adapter.lora_A
    assert adapter.lora_A.shape == (4, in_features)
    assert adapter.lora_B.shape == (out_features, 4)
    torch.testing.assert_close(adapter.delta(), expected)


def test_forward_is_the_product_with_delta():
    adapter = trained(12, 6, rank=3, alpha=7.0)
    x = torch.randn(2, 5, 12)
    expected = x @ (7 / 3 * adapter.lora_B @ adapter.lora_A).T
    torch.testing.assert_close(adapter(x), expected)


def test_starts_at_zero_with_lora_a_kaiming_uniform():
    adapter = LoRA(64, 32, rank=16)
    bound = 1 / math.sqrt(64)  # gain sqrt(2 / (1 + 5)) times sqrt(3 / fan_in)
    assert not adapter.delta().any()
    assert 0.9 * bound < adapter.lora_A.abs().max() <= bound


@pytest.mark.parametrize("rank", [1, 8, 28])
def test_parameter_count_is_rank_times_both_sides(rank):
    assert LoRA.num_parameters(768, 3072, rank=rank) == rank * (768 + 3072)


def test_dropout_drops_inputs_only_while_training():
    adapter = LoRA(1000, 1000, rank=1000, dropout=0.25)
    adapter.lora_A.data.copy_(torch.eye(1000))
    adapter.lora_B.data.copy_(torch.eye(1000))
    x = torch.ones(4, 1000)
    torch.testing.assert_close(adapter.eval()(x), x)
    y = adapter.train()(x)
    kept = y > 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.05)
    torch.testing.assert_close(adapter.delta(), torch.eye(1000))


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one_is_refused(rank):
    with pytest.raises(VlkrError, match=f"rank {rank} "):
        LoRA(8, 8, rank=rank)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5])
def test_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(VlkrError, match=f"dropout {dropout} "):
        LoRA(8, 8, dropout=dropout)
