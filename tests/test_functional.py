import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkr.functional import effective_rank, khatri_rao, stable_rank

SIZES = st.integers(1, 7)


def numpy_effective_rank(matrix):
    sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def orthogonal(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, SIZES)
def test_khatri_rao_equals_a_double_loop(m, k1, k2):
    u, v = torch.randn(m, k1), torch.randn(m, k2)
    product = khatri_rao(u, v)
    assert product.shape == (m, k1 * k2)
    for i in range(m):
        for q in range(k2):
            for p in range(k1):
                assert product[i, q * k1 + p] == v[i, q] * u[i, p]


def test_khatri_rao_rows_are_kronecker_products():
    u, v = torch.randn(5, 3), torch.randn(5, 4)
    expected = torch.stack([torch.kron(v_row, u_row) for u_row, v_row in zip(u, v, strict=True)])
    assert torch.equal(khatri_rao(u, v), expected)


def test_khatri_rao_of_generic_factors_has_full_rank():
    product = khatri_rao(torch.randn(12, 4).double(), torch.randn(12, 4).double())
    assert np.linalg.matrix_rank(product.numpy()) == 12


def test_khatri_rao_passes_gradcheck():
    u = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(khatri_rao, (u, v))


@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ranks_of_a_zero_matrix_are_zero(rank, dtype):
    assert rank(torch.zeros(4, 6, dtype=dtype)).item() == 0


@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
def test_ranks_of_an_outer_product_are_one(rank):
    matrix = torch.outer(torch.randn(8).double(), torch.randn(5).double())
    assert rank(matrix).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
@pytest.mark.parametrize("size", [1, 2, 9, 32])
def test_ranks_of_an_orthogonal_matrix_are_its_size(rank, size):
    assert rank(3.7 * orthogonal(size)).item() == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (7, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_effective_rank_of_a_gaussian_equals_numpys_formula(shape, dtype):
    matrix = torch.randn(shape, dtype=dtype)
    assert effective_rank(matrix).item() == pytest.approx(numpy_effective_rank(matrix), rel=1e-4)


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (7, 64)])
def test_stable_rank_is_the_ratio_of_squared_norms(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    frobenius = np.linalg.norm(matrix.numpy(), "fro")
    spectral = np.linalg.norm(matrix.numpy(), 2)
    assert stable_rank(matrix).item() == pytest.approx((frobenius / spectral) ** 2, rel=1e-9)


@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
def test_ranks_do_not_depend_on_the_scale(rank):
    matrix = torch.randn(6, 6)
    for scale in (1e-30, 1e-18, 1.0, 1e18, 1e30):
        assert rank(scale * matrix).item() == pytest.approx(rank(matrix).item(), rel=1e-3), scale


@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
def test_ranks_of_a_batch_are_those_of_its_matrices(rank):
    batch = torch.stack([torch.randn(4, 6), torch.zeros(4, 6), torch.eye(4, 6)])
    found = rank(batch)
    assert found.shape == (3,)
    assert found.isfinite().all()
    for one, matrix in zip(found, batch, strict=True):
        assert one.item() == pytest.approx(rank(matrix).item(), rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(SIZES, SIZES, st.integers(0, 3), st.sampled_from([1e-38, 1e-20, 1.0, 1e20, 1e37]))
def test_ranks_lie_between_zero_and_the_short_side(m, n, true_rank, scale):
    matrix = scale * (torch.randn(m, true_rank) @ torch.randn(true_rank, n))
    for rank in (effective_rank, stable_rank):
        value = rank(matrix).item()
        assert not np.isnan(value)
        assert 0 <= value <= min(m, n) * (1 + 1e-5)
        assert (value == 0) == (not matrix.any())
