import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkr.adapters import KRAdapter
from vlkr.errors import VlkrError
from vlkr.functional import effective_rank

SHAPES = [(8, 8), (16, 16), (20, 6), (6, 20), (17, 5), (5, 17), (1, 9), (9, 1), (1, 1)]


def factors(adapter, short):
    """``u (m, k1)`` and ``v (m, k2)`` of a single term, filled with random numbers."""
    for p in adapter.parameters():
        p.data.normal_()
    return (f.detach().reshape(short, -1) for f in (adapter.u, adapter.v))


def by_hand(u, v, in_features, out_features, scale, column):
    """The authors' formula, entry by entry; ``column`` gives the place of ``u[i, p] v[i, q]``."""
    m, long = min(in_features, out_features), max(in_features, out_features)
    k1, k2 = u.shape[1], v.shape[1]
    product = torch.zeros(m, k1 * k2, dtype=u.dtype)
    for i in range(m):
        for p in range(k1):
            for q in range(k2):
                product[i, column(p, q, k1, k2)] = v[i, q] * u[i, p]
    delta = scale * product[:, :long]
    return delta.T if out_features > in_features else delta


def reference_column(p, q, k1, k2):
    return q * k1 + p


def balanced_column(p, q, k1, k2):
    return p * k2 + q


RULES = [("reference", reference_column), ("balanced", balanced_column)]


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_reference_rule_equals_the_authors_layer(in_features, out_features):
    adapter = KRAdapter(in_features, out_features)
    m, long = sorted((in_features, out_features))
    u, v = factors(adapter, m)
    k1 = math.isqrt(m)
    assert (u.shape, v.shape) == ((m, k1), (m, math.ceil(long / k1)))
    expected = by_hand(u, v, in_features, out_features, 2, reference_column)
    torch.testing.assert_close(adapter.delta(), expected)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_balanced_rule_equals_the_authors_matrix_benchmark(in_features, out_features):
    adapter = KRAdapter(in_features, out_features, rule="balanced", scale=1.0)
    m, long = sorted((in_features, out_features))
    u, v = factors(adapter, m)
    k1 = math.isqrt(long)
    assert (u.shape, v.shape) == ((m, k1), (m, math.ceil(long / k1)))
    expected = by_hand(u, v, in_features, out_features, 1, balanced_column)
    torch.testing.assert_close(adapter.delta(), expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(-4, 4))
def test_both_rules_equal_the_formula_for_any_shape_and_scale(in_features, out_features, scale):
    for rule, column in RULES:
        adapter = KRAdapter(in_features, out_features, rule=rule, scale=scale)
        u, v = factors(adapter, min(in_features, out_features))
        expected = by_hand(u, v, in_features, out_features, scale, column)
        torch.testing.assert_close(adapter.delta(), expected)


@pytest.mark.parametrize(
    ("in_features", "out_features", "parameters"),
    [(768, 768, 43008), (768, 3072, 108288), (3072, 768, 108288), (512, 512, 23552)],
)
def test_parameter_count_of_the_reference_rule(in_features, out_features, parameters):
    assert KRAdapter.num_parameters(in_features, out_features) == parameters
    adapter = KRAdapter(in_features, out_features)
    assert sum(p.numel() for p in adapter.parameters()) == parameters


def test_parameter_count_of_the_balanced_rule():
    # 1024 x 768: k1 = k2 = 32 columns for each of 768 rows.
    assert KRAdapter.num_parameters(768, 1024, rule="balanced") == 768 * (32 + 32)


@pytest.mark.parametrize(("rule", "a"), [("reference", 5.0), ("balanced", math.sqrt(5))])
def test_starts_at_zero_with_v_kaiming_uniform(rule, a):
    adapter = KRAdapter(96, 64, rule=rule)
    v = adapter.v.detach().reshape(64, -1)
    bound = math.sqrt(2 / (1 + a**2)) * math.sqrt(3 / v.shape[1])
    assert not adapter.u.any()
    assert not adapter.delta().any()
    assert 0.9 * bound < v.abs().max() <= bound
    assert abs(v.mean()) < 0.1 * bound


def test_trained_change_has_a_high_effective_rank():
    adapter = KRAdapter(64, 64)
    for p in adapter.parameters():
        p.data.normal_()
    assert effective_rank(adapter.delta()) > 32


def test_u_receives_a_gradient_at_the_start_and_v_does_not():
    adapter = KRAdapter(12, 8)
    adapter.delta().sum().backward()
    assert adapter.u.grad.abs().max() > 0
    assert not adapter.v.grad.any()


def test_factors_follow_dtype_and_device():
    adapter = KRAdapter(12, 8).double()
    assert adapter.delta().dtype == torch.float64
    with torch.device("meta"):
        assert KRAdapter(12, 8).delta().device.type == "meta"


@pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (20, 6), (5, 17)])
@pytest.mark.parametrize(("rule", "column"), RULES)
def test_terms_add_up(in_features, out_features, rule, column):
    adapter = KRAdapter(in_features, out_features, rule=rule, num_terms=3, scale=1.5)
    for p in adapter.parameters():
        p.data.normal_()
    terms = [
        by_hand(u, v, in_features, out_features, 1.5, column)
        for u, v in zip(adapter.u.detach(), adapter.v.detach(), strict=True)
    ]
    torch.testing.assert_close(adapter.delta(), sum(terms))
    single = KRAdapter.num_parameters(in_features, out_features, rule=rule)
    assert KRAdapter.num_parameters(in_features, out_features, rule=rule, num_terms=3) == 3 * single


@pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (30, 6), (5, 31), (1, 1)])
@pytest.mark.parametrize("rule", ["reference", "balanced"])
def test_three_factors_multiply_in_every_row(in_features, out_features, rule):
    adapter = KRAdapter(in_features, out_features, rule=rule, num_factors=3)
    assert not adapter.delta().any()
    for p in adapter.parameters():
        p.data.normal_()
    rows = []
    for u, v, w in zip(adapter.u[0], adapter.v[0], adapter.w[0], strict=True):
        # The first factor varies fastest with the reference layout, slowest with the balanced one.
        inner, middle, outer = (u, v, w) if rule == "reference" else (w, v, u)
        rows.append(2 * torch.kron(outer, torch.kron(middle, inner)))
    expected = torch.stack(rows)[:, : max(in_features, out_features)]
    expected = expected.T if out_features > in_features else expected
    torch.testing.assert_close(adapter.delta(), expected)


def test_three_factors_need_fewer_parameters():
    count = KRAdapter.num_parameters
    assert count(768, 768, num_factors=3) < count(768, 768, rule="balanced")


@pytest.mark.parametrize(
    ("options", "named"), [({"num_terms": 0}, "num_terms 0"), ({"num_factors": 4}, "num_factors 4")]
)
def test_terms_and_factors_out_of_range_are_refused(options, named):
    with pytest.raises(VlkrError, match=named):
        KRAdapter(8, 8, **options)


def test_unknown_rule_is_named():
    with pytest.raises(VlkrError, match="'best'"):
        KRAdapter(8, 8, rule="best")


@pytest.mark.parametrize("options", [{"scale": 0.5}, {"rule": "balanced", "scale": 1.0}])
def test_options_give_back_an_equal_adapter(options):
    adapter = KRAdapter(12, 8, **options)
    assert options.items() <= adapter.options().items()
    twin = KRAdapter(12, 8, **adapter.options())
    twin.load_state_dict(adapter.state_dict())
    assert torch.equal(twin.delta(), adapter.delta())
