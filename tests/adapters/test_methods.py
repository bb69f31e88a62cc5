"""The other methods against their papers' formulas, written out."""

import math

import pytest
import torch

from vlkr.adapters import ADAPTERS, merge_and_unload
from vlkr.adapters.inject import injected_adapters
from vlkr.errors import VlkrError

SHAPES = [(8, 8), (12, 6), (6, 12)]


def trained(name, in_features, out_features, **options):
    adapter = ADAPTERS[name](in_features, out_features, **options).double()
    for p in adapter.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return adapter


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_dora_rescales_the_rows_of_the_low_rank_update(in_features, out_features):
    adapter = trained("dora", in_features, out_features, rank=3, alpha=6.0)
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    updated = weight + 2 * adapter.lora_B @ adapter.lora_A
    adapted = torch.stack(
        [
            m * row / row.square().sum().sqrt()
            for m, row in zip(adapter.magnitude, updated, strict=True)
        ]
    )
    torch.testing.assert_close(weight + adapter.delta(weight), adapted)


def test_dora_magnitude_starts_at_the_norms_of_the_rows():
    adapter = ADAPTERS["dora"](12, 6, rank=3)
    weight = torch.randn(6, 12)
    adapter.init_from_weight(weight)
    torch.testing.assert_close(adapter.magnitude.detach(), weight.square().sum(1).sqrt())


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_vera_scales_frozen_matrices(in_features, out_features):
    adapter = trained("vera", in_features, out_features, rank=5)
    b, d = torch.diag(adapter.vera_b), torch.diag(adapter.vera_d)
    torch.testing.assert_close(adapter.delta(), b @ adapter.B @ d @ adapter.A)
    x = torch.randn(4, in_features, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), x @ (b @ adapter.B @ d @ adapter.A).T)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_randlora_sums_scaled_bases(in_features, out_features):
    adapter = trained("randlora", in_features, out_features, rank=2, alpha=6.0)
    short, long = sorted((in_features, out_features))
    bases = math.ceil(short / 2)
    assert adapter.randlora_lambda.shape == (bases, 2)
    assert adapter.randlora_gamma.shape == (bases, short)
    total = torch.zeros(long, short, dtype=torch.float64)
    for n in range(bases):
        left, right = adapter.randlora_lambda[n], adapter.randlora_gamma[n]
        basis = adapter.B.reshape(long, bases, 2)[:, n]
        total = total + 3 * basis @ torch.diag(left) @ adapter.A @ torch.diag(right)
    expected = total if out_features > in_features else total.T
    torch.testing.assert_close(adapter.delta(), expected)


@pytest.mark.parametrize("name", ["vera", "randlora"])
def test_frozen_bases_are_remade_from_the_seed_and_not_stored(name):
    one, same = (ADAPTERS[name](12, 6, rank=3, seed=5) for _ in range(2))
    other = ADAPTERS[name](12, 6, rank=3, seed=6)
    assert torch.equal(one.A, same.A)
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.A, other.A)
    assert not {"A", "B"} & set(one.state_dict())
    assert not {"A", "B"} & {name for name, _ in one.named_parameters()}


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize(("gain", "divisor"), [(None, None), (4.0, 4.0)])
def test_sinlora_is_the_sine_of_the_low_rank_product(in_features, out_features, gain, divisor):
    adapter = trained("sinlora", in_features, out_features, rank=3, frequency=20.0, gain=gain)
    expected = torch.sin(20 * adapter.lora_B @ adapter.lora_A)
    divisor = divisor or math.sqrt(in_features)
    torch.testing.assert_close(adapter.delta(), expected / divisor)


@pytest.mark.parametrize("grad", [True, False])
def test_sinlora_under_autocast_keeps_its_phase_in_fp32(grad, adapt, plain):
    linear = torch.nn.Sequential(torch.nn.Linear(64, 64))
    model, base, _ = adapt(linear, "sinlora", targets=["0"], frequency=200.0, rank=16)
    x = torch.randn(4, 64)
    expected = plain(model, base)(x)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("num_terms", [1, 3])
def test_krona_is_a_sum_of_kronecker_products(in_features, out_features, num_terms):
    adapter = trained("krona", in_features, out_features, scale=1.5, num_terms=num_terms)
    expected = 1.5 * sum(
        torch.kron(a, b) for a, b in zip(adapter.krona_A, adapter.krona_B, strict=True)
    )
    assert expected.shape == (out_features, in_features)
    torch.testing.assert_close(adapter.delta(), expected)
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), x @ expected.T)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("dora", {"rank": 8}, 8 * (768 + 3072) + 3072),
        ("vera", {"rank": 256}, 256 + 3072),
        ("randlora", {"rank": 32}, 24 * (32 + 768)),
        ("sinlora", {"rank": 8}, 8 * (768 + 3072)),
        ("krona", {}, 48 * 24 + 64 * 32),
        ("full", {}, 768 * 3072),
        ("bitfit", {}, 3072),
    ],
)
def test_parameter_counts(name, options, parameters):
    assert ADAPTERS[name].num_parameters(768, 3072, **options) == parameters


@pytest.mark.parametrize("name", ["dora", "vera", "randlora", "sinlora"])
def test_rank_below_one_is_refused(name):
    with pytest.raises(VlkrError, match="rank 0 "):
        ADAPTERS[name](8, 8, rank=0)


def test_krona_without_terms_is_refused():
    with pytest.raises(VlkrError, match="num_terms 0 "):
        ADAPTERS["krona"](8, 8, num_terms=0)


def test_full_trains_as_a_trainable_linear_does(adapt):
    model, base, _ = adapt(
        torch.nn.Sequential(torch.nn.Linear(6, 4)), "full", targets=["0"], trained=False
    )
    base[0].bias.requires_grad_(False)
    x = torch.randn(16, 6)
    for one in (model, base):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    merge_and_unload(model)
    torch.testing.assert_close(model[0].weight, base[0].weight, check_stride=False)


def test_bitfit_moves_the_bias_alone(adapt):
    model, base, _ = adapt(torch.nn.Sequential(torch.nn.Linear(6, 4)), "bitfit", targets=["0"])
    change = injected_adapters(model)[0].adapter.delta().detach()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), base(x) + change)
    merge_and_unload(model)
    assert torch.equal(model[0].weight, base[0].weight)


def test_bitfit_names_a_weight_without_a_bias(adapt):
    with pytest.raises(VlkrError, match="0 has no bias"):
        adapt(torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False)), "bitfit", targets=["0"])
