"""Every method against its paper's formula, written out."""

import math

import pytest
import torch
from helpers import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlkr.adapters import ADAPTERS, KRAdapter, LoRA, merge_and_unload
from vlkr.adapters.inject import injected_adapters
from vlkr.errors import VlkrError
from vlkr.functional import effective_rank

SHAPES = pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (12, 6), (6, 12)])


def trained(name, in_features, out_features, **options):
    adapter = ADAPTERS[name](in_features, out_features, **options).double()
    for p in adapter.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return adapter


def by_hand(u, v, in_features, out_features, scale, column):
    """The authors' formula, entry by entry; ``column`` gives the place of ``u[i, p] v[i, q]``."""
    m, long = sorted((in_features, out_features))
    k1, k2 = u.shape[1], v.shape[1]
    product = torch.zeros(m, k1 * k2, dtype=u.dtype)
    for i in range(m):
        for p in range(k1):
            for q in range(k2):
                product[i, column(p, q, k1, k2)] = v[i, q] * u[i, p]
    delta = scale * product[:, :long]
    return delta.T if out_features > in_features else delta


RULES = {
    "reference": lambda p, q, k1, k2: q * k1 + p,
    "balanced": lambda p, q, k1, k2: p * k2 + q,
}
SIZES = st.integers(1, 24)


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, st.sampled_from(sorted(RULES)), st.integers(1, 3), st.floats(-4, 4))
def test_kradapter_is_the_authors_formula(in_features, out_features, rule, num_terms, scale):
    options = {"rule": rule, "num_terms": num_terms, "scale": scale}
    adapter = trained("kradapter", in_features, out_features, **options)
    m, long = sorted((in_features, out_features))
    k1 = math.isqrt(m if rule == "reference" else long)
    assert adapter.u.shape == (num_terms, m, k1)
    assert adapter.v.shape == (num_terms, m, math.ceil(long / k1))
    terms = [
        by_hand(u, v, in_features, out_features, scale, RULES[rule])
        for u, v in zip(adapter.u.detach(), adapter.v.detach(), strict=True)
    ]
    assert_near(adapter.delta(), sum(terms), terms=num_terms, scale=1.0)


@pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (30, 6), (5, 31), (1, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_three_factors_multiply_in_every_row(in_features, out_features, rule):
    adapter = trained("kradapter", in_features, out_features, rule=rule, num_factors=3)
    rows = []
    for u, v, w in zip(adapter.u[0], adapter.v[0], adapter.w[0], strict=True):
        # The first factor varies fastest in the reference layout, slowest in the balanced one.
        inner, middle, outer = (u, v, w) if rule == "reference" else (w, v, u)
        rows.append(2 * torch.kron(outer, torch.kron(middle, inner)))
    expected = torch.stack(rows)[:, : max(in_features, out_features)]
    assert_near(adapter.delta(), expected.T if out_features > in_features else expected, terms=4)


@pytest.mark.parametrize(("rule", "a"), [("reference", 5.0), ("balanced", math.sqrt(5))])
@pytest.mark.parametrize("num_factors", [2, 3])
def test_kradapter_initialization(rule, a, num_factors):
    adapter = KRAdapter(96, 64, rule=rule, num_factors=num_factors)
    v = adapter.v.detach().reshape(64, -1)
    bound = math.sqrt(2 / (1 + a**2)) * math.sqrt(3 / v.shape[1])
    assert not adapter.u.any()
    assert not adapter.delta().any()
    assert 0.9 * bound < v.abs().max() <= bound
    assert abs(v.mean()) < 0.15 * bound
    adapter.delta().sum().backward()
    assert adapter.u.grad.abs().max() > 0
    assert not adapter.v.grad.any()
    if num_factors == 3:  # uniform, of mean 0 and variance 1
        assert adapter.w.detach().square().mean().item() == pytest.approx(1, abs=0.2)
        assert 0.9 * math.sqrt(3) < adapter.w.abs().max() <= math.sqrt(3)
        assert abs(adapter.w.detach().mean()) < 0.2


def test_a_kradapters_update_has_a_high_effective_rank():
    adapter = KRAdapter(64, 64)
    for p in adapter.parameters():
        nn.init.normal_(p)
    assert effective_rank(adapter.delta()) > 32


def test_factors_follow_dtype_and_device():
    assert KRAdapter(12, 8).double().delta().dtype == torch.float64
    with torch.device("meta"):
        assert KRAdapter(12, 8).delta().device.type == "meta"


@SHAPES
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
def test_lora_is_the_scaled_product(in_features, out_features, options, scaling):
    adapter = trained("lora", in_features, out_features, rank=4, **options)
    expected = scaling * adapter.lora_B @ adapter.lora_A
    assert adapter.lora_A.shape == (4, in_features)
    assert_near(adapter.delta(), expected)
    x = torch.randn(2, 5, in_features, dtype=torch.float64)
    assert_near(adapter(x), x @ expected.T)


def test_lora_initialization():
    adapter = LoRA(64, 32, rank=16)
    bound = 1 / math.sqrt(64)  # gain sqrt(2 / (1 + 5)) times sqrt(3 / fan_in)
    assert not adapter.delta().any()
    assert 0.9 * bound < adapter.lora_A.abs().max() <= bound


def test_dropout_drops_inputs_only_in_training():
    adapter = LoRA(1000, 1000, rank=1000, dropout=0.25)
    adapter.lora_A.data.copy_(torch.eye(1000))
    adapter.lora_B.data.copy_(torch.eye(1000))
    x = torch.ones(4, 1000)
    assert_near(adapter.eval()(x), x)
    y = adapter.train()(x)
    kept = y > 0
    assert_near(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.05)
    assert_near(adapter.delta(), torch.eye(1000))


@SHAPES
def test_dora_rescales_the_rows_of_the_low_rank_update(in_features, out_features):
    adapter = trained("dora", in_features, out_features, rank=3, alpha=6.0)
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    updated = weight + 2 * adapter.lora_B @ adapter.lora_A
    rows = zip(adapter.magnitude, updated, strict=True)
    adapted = torch.stack([m * row / row.square().sum().sqrt() for m, row in rows])
    assert_near(weight + adapter.delta(weight), adapted)
    adapter.init_from_weight(weight)
    assert_near(adapter.magnitude.detach(), weight.square().sum(1).sqrt())


@SHAPES
def test_vera_scales_frozen_matrices(in_features, out_features):
    adapter = trained("vera", in_features, out_features, rank=5)
    b, d = torch.diag(adapter.vera_b), torch.diag(adapter.vera_d)
    expected = b @ adapter.B @ d @ adapter.A
    assert_near(adapter.delta(), expected)
    x = torch.randn(4, in_features, dtype=torch.float64)
    assert_near(adapter(x), x @ expected.T)


def test_veras_matrices_are_kaiming_scaled():
    adapter = ADAPTERS["vera"](400, 100, rank=200)
    for matrix, fan_in in ((adapter.A, 400), (adapter.B, 200)):
        bound = math.sqrt(3 / fan_in)  # uniform with variance 1 / fan_in
        assert 0.98 * bound < matrix.abs().max() <= 1.0001 * bound
        assert matrix.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.02)
    assert (adapter.vera_d == 0.1).all()


@SHAPES
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
    assert_near(adapter.delta(), total if out_features > in_features else total.T)


def test_randloras_bases_have_unit_variance():
    adapter = ADAPTERS["randlora"](200, 300, rank=20)
    for basis in (adapter.A, adapter.B):
        assert basis.std().item() == pytest.approx(1, rel=0.03)
        assert basis.abs().max() <= 1.0001 * math.sqrt(3)
    assert (adapter.randlora_gamma == torch.tensor(1 / 300)).all()
    assert (adapter.scaling, ADAPTERS["randlora"](8, 8, rank=4, alpha=2.0).scaling) == (20, 0.5)


@pytest.mark.parametrize("name", ["vera", "randlora"])
def test_frozen_bases_are_remade_from_the_seed_and_not_stored(name):
    one, same = (ADAPTERS[name](12, 6, rank=3, seed=5) for _ in range(2))
    other = ADAPTERS[name](12, 6, rank=3, seed=6)
    assert torch.equal(one.A, same.A)
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.A, other.A)
    assert not {"A", "B"} & (set(one.state_dict()) | {name for name, _ in one.named_parameters()})


@SHAPES
@pytest.mark.parametrize(("gain", "divisor"), [(None, None), (4.0, 4.0)])
def test_sinlora_is_the_sine_of_the_low_rank_product(in_features, out_features, gain, divisor):
    adapter = trained("sinlora", in_features, out_features, rank=3, frequency=20.0, gain=gain)
    expected = torch.sin(20 * adapter.lora_B @ adapter.lora_A) / (divisor or math.sqrt(in_features))
    assert_near(adapter.delta(), expected, condition=20)


@pytest.mark.parametrize("grad", [True, False])
def test_sinlora_under_autocast_keeps_its_phase_in_fp32(grad, adapt, plain):
    linear = nn.Sequential(nn.Linear(64, 64))
    model, base, _ = adapt(linear, "sinlora", targets=["0"], frequency=200.0, rank=16)
    x = torch.randn(4, 64)
    expected = plain(model, base)(x)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).norm() < 0.05 * expected.norm()


@SHAPES
@pytest.mark.parametrize("num_terms", [1, 3])
def test_krona_is_a_sum_of_kronecker_products(in_features, out_features, num_terms):
    adapter = trained("krona", in_features, out_features, scale=1.5, num_terms=num_terms)
    pairs = zip(adapter.krona_A, adapter.krona_B, strict=True)
    expected = 1.5 * sum(torch.kron(a, b) for a, b in pairs)
    assert expected.shape == (out_features, in_features)
    assert_near(adapter.delta(), expected)
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    assert_near(adapter(x), x @ expected.T)


@pytest.mark.parametrize(
    ("name", "sizes", "options", "parameters"),
    [
        ("kradapter", (768, 768), {}, 43008),
        ("kradapter", (768, 3072), {}, 108288),
        ("kradapter", (3072, 768), {}, 108288),
        # 1024 x 768: k1 = k2 = 32 columns for each of 768 rows.
        ("kradapter", (768, 1024), {"rule": "balanced"}, 768 * 64),
        ("kradapter", (768, 1024), {"rule": "balanced", "num_terms": 3}, 3 * 768 * 64),
        ("kradapter", (768, 768), {"num_factors": 3}, 768 * (9 + 10 + 9)),
        ("lora", (768, 3072), {"rank": 28}, 28 * (768 + 3072)),
        ("dora", (768, 3072), {"rank": 8}, 8 * (768 + 3072) + 3072),
        ("vera", (768, 3072), {"rank": 256}, 256 + 3072),
        ("randlora", (768, 3072), {"rank": 32}, 24 * (32 + 768)),
        ("sinlora", (768, 3072), {"rank": 8}, 8 * (768 + 3072)),
        ("krona", (768, 3072), {}, 48 * 24 + 64 * 32),
        ("full", (768, 3072), {}, 768 * 3072),
        ("bitfit", (768, 3072), {}, 3072),
    ],
)
def test_parameter_counts(name, sizes, options, parameters):
    assert ADAPTERS[name].num_parameters(*sizes, **options) == parameters


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *((name, {"rank": 0}, "rank 0 ") for name in ("lora", "dora", "vera", "randlora")),
        ("sinlora", {"rank": -3}, "rank -3 "),
        ("lora", {"dropout": -0.1}, "dropout -0.1 "),
        ("lora", {"dropout": 1.0}, "dropout 1.0 "),
        ("krona", {"num_terms": 0}, "num_terms 0 "),
        ("kradapter", {"num_terms": 0}, "num_terms 0 "),
        ("kradapter", {"num_factors": 4}, "num_factors 4 "),
        ("kradapter", {"rule": "best"}, "'best'"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(VlkrError, match=message):
        ADAPTERS[name](8, 8, **options)


def test_full_trains_as_a_trainable_linear_does(adapt):
    model, base, _ = adapt(nn.Sequential(nn.Linear(6, 4)), "full", targets=["0"], trained=False)
    base[0].bias.requires_grad_(False)
    x = torch.randn(16, 6)
    for one in (model, base):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    merge_and_unload(model)
    assert_near(model[0].weight, base[0].weight)


def test_bitfit_moves_only_the_bias(adapt):
    model, base, _ = adapt(nn.Sequential(nn.Linear(6, 4)), "bitfit", targets=["0"])
    update = injected_adapters(model)[0].adapter.delta().detach()
    x = torch.randn(3, 6)
    assert_near(model(x), base(x) + update)
    merge_and_unload(model)
    assert torch.equal(model[0].weight, base[0].weight)
    with pytest.raises(VlkrError, match="0 has no bias"):
        adapt(nn.Sequential(nn.Linear(6, 4, bias=False)), "bitfit", targets=["0"])
