import numpy as np
import pytest
import scipy.optimize
import torch
from helpers import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkr.errors import VlkrError
from vlkr.functional import (
    add_khatri_rao,
    decompose,
    effective_rank,
    khatri_rao,
    khatri_rao_gradients,
    nuclear_norm,
    singular_values,
    spectrum_measures,
    stable_rank,
    subspace_overlap,
)
from vlkr.projections import project_kradapter, project_kronecker, project_lora

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


@settings(deadline=None, max_examples=60)
@given(m=SIZES, k1=SIZES, k2=SIZES, cut=st.integers(0, 6), tall=st.booleans(), data=st.data())
def test_khatri_rao_sum_and_gradients_equal_autograds(m, k1, k2, cut, tall, data):
    n = max(k1, k1 * k2 - cut)
    u = torch.randn(m, k1, dtype=torch.float64, requires_grad=True)
    v = torch.randn(m, k2, dtype=torch.float64, requires_grad=True)
    base, grad = (torch.randn(m, n, dtype=torch.float64) for _ in range(2))
    if tall:  # laid out by columns, as a tall weight is when it is transposed
        base = base.T.contiguous().T
    expected = base + 3 * khatri_rao(u, v)[:, :n]
    out = base if data.draw(st.booleans()) else torch.empty_like(base)
    with torch.no_grad():
        add_khatri_rao(base, u, v, 3.0, out)
        found = khatri_rao_gradients(grad, u, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(khatri_rao(u, v)[:, :n], [u, v], grad))


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


def norm(matrix):
    return float(np.linalg.norm(np.asarray(matrix, dtype=np.float64).reshape(-1)))


def tail_norm(matrix, rank):
    """Frobenius norm of what the best approximation of a rank leaves."""
    return norm(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[rank:])


def test_spectrum_measures_are_numpys_norms():
    matrix = torch.randn(9, 5, dtype=torch.float64)
    sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)
    measures = spectrum_measures(singular_values(matrix))
    assert nuclear_norm(matrix).item() == pytest.approx(np.linalg.norm(matrix.numpy(), "nuc"))
    assert measures["nuclear_norm"].item() == pytest.approx(sigma.sum())
    assert measures["frobenius_norm"].item() == pytest.approx(norm(matrix))
    assert measures["spectral_norm"].item() == pytest.approx(sigma[0])
    assert measures["effective_rank"].item() == pytest.approx(numpy_effective_rank(matrix))
    assert all(v.item() == 0 for v in spectrum_measures(torch.zeros(4)).values())


@pytest.mark.parametrize(("k", "j"), [(2, 2), (1, 4), (3, 5), (8, 2)])
def test_subspace_overlap_is_the_mean_squared_cosine(k, j):
    a, b = orthogonal(8)[:, :k], orthogonal(8)[:, :j]
    # The projector onto a, seen from b, has these squared cosines for eigenvalues.
    squared = np.linalg.eigvalsh((b.T @ a @ a.T @ b).numpy())[::-1][: min(k, j)]
    assert subspace_overlap(a, b).item() == pytest.approx(squared.mean())
    assert subspace_overlap(a, a).item() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(8, 8), (6, 12), (12, 6)])
@pytest.mark.parametrize("rank", [1, 3, 6, 20])
def test_project_lora_has_eckart_and_youngs_error(shape, rank):
    matrix = torch.randn(shape, dtype=torch.float64)
    a, b = project_lora(matrix, rank)
    assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
    assert norm(b @ a - matrix) == pytest.approx(tail_norm(matrix, rank), abs=1e-9)
    assert norm(a) == pytest.approx(norm(b))


def khatri_rao_sum(u, v, shape):
    short, long = sorted(shape)
    total = torch.zeros(short, long, dtype=u.dtype)
    for u_term, v_term in zip(u, v, strict=True):
        for i in range(short):
            total[i] += torch.kron(v_term[i], u_term[i])[:long]
    return total.T if shape[0] > shape[1] else total


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (12, 12)])
@pytest.mark.parametrize(("k1", "num_terms"), [(3, 1), (4, 1), (4, 2), (3, 3), (3, 5)])
def test_project_kradapter_is_the_truncated_svd_of_every_row(shape, k1, num_terms):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, v = project_kradapter(matrix, k1, num_terms=num_terms)
    rows = matrix if shape[0] <= shape[1] else matrix.T
    best = norm([tail_norm(row.reshape(12 // k1, k1), num_terms) for row in rows])
    assert u.shape == (num_terms, rows.shape[0], k1)
    assert v.shape == (num_terms, rows.shape[0], 12 // k1)
    assert norm(khatri_rao_sum(u, v, shape) - matrix) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("shape", [(5, 11), (11, 5), (7, 7), (1, 10)])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_project_kradapter_with_truncated_columns_beats_zero_filling(shape, num_terms):
    short, long = sorted(shape)
    k1 = 3
    k2 = -(-long // k1)
    matrix = torch.randn(shape, dtype=torch.float64)
    rows = matrix if shape[0] <= shape[1] else matrix.T
    filled = torch.zeros(short, k1 * k2, dtype=torch.float64)
    filled[:, :long] = rows
    zero_filled = norm([tail_norm(row.reshape(k2, k1), num_terms) for row in filled])
    errors = []
    for refine in (0, 5, 50):
        u, v = project_kradapter(matrix, k1, num_terms=num_terms, refine=refine)
        errors.append(norm(khatri_rao_sum(u, v, shape) - matrix))
    # A closed form and alternating least squares, each exact to rounding.
    slack = tolerance(matrix, terms=short * long)
    assert errors[0] <= zero_filled + slack
    assert errors[1] <= errors[0] + slack
    assert errors[2] <= errors[1] + slack
    if num_terms == 1 and short > 1:  # with something to gain, refining gains more than rounding
        assert errors[2] < errors[0] - slack


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (5, 11)])
def test_project_kradapter_finds_what_a_kradapter_made(shape):
    short, long = sorted(shape)
    u, v = torch.randn(1, short, 3).double(), torch.randn(1, short, -(-long // 3)).double()
    matrix = khatri_rao_sum(u, v, shape)
    found = project_kradapter(matrix, 3, refine=300)
    assert norm(khatri_rao_sum(*found, shape) - matrix) < 1e-3 * norm(matrix)


@pytest.mark.parametrize("left_shape", [(2, 3), (4, 2), (1, 1), (8, 12)])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_project_kronecker_is_the_truncated_svd_of_the_blocks(left_shape, num_terms):
    matrix = torch.randn(8, 12, dtype=torch.float64)
    left, right = project_kronecker(matrix, left_shape, num_terms=num_terms)
    height, width = 8 // left_shape[0], 12 // left_shape[1]
    blocks = [
        matrix[i * height : (i + 1) * height, j * width : (j + 1) * width].flatten()
        for i in range(left_shape[0])
        for j in range(left_shape[1])
    ]
    total = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    best = tail_norm(torch.stack(blocks), num_terms)
    assert norm(total - matrix) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: project_lora(m, 0), "rank 0"),
        (lambda m: project_kradapter(m, 0), "k1 0"),
        (lambda m: project_kradapter(m, 13), "k1 13"),
        (lambda m: project_kradapter(m, 3, num_terms=0), "num_terms 0"),
        (lambda m: project_kronecker(m, (3, 3)), "3x3"),
        (lambda m: project_kronecker(m, (2, 0)), "2x0"),
        (lambda m: project_kronecker(m, (2, 3), num_terms=0), "num_terms 0"),
    ],
)
def test_projections_name_what_is_out_of_range(call, named):
    with pytest.raises(VlkrError, match=named):
        call(torch.randn(8, 12))


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (9, 9), (1, 5)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("condition", [1.0, 1e6, float("inf")])
def test_decompose_is_numpys_svd(shape, scale, condition):
    size = min(shape)
    sigma = torch.logspace(0, -np.log10(min(condition, 1e6)), size).double()
    if condition == float("inf"):
        sigma[size // 2 + 1 :] = 0
    u, v = (torch.linalg.qr(torch.randn(n, size).double()).Q for n in shape)
    matrix = (scale * (u * sigma @ v.T)).float()
    found = decompose(matrix, leading=3)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found.sigma, expected, rtol=1e-4, atol=3e-7 * expected[0])
    k = min(3, int((sigma > 0).sum()))
    assert (found.left.shape, found.right.shape) == ((shape[0], k), (shape[1], k))
    for column in range(k):
        image = matrix.double() @ found.right[:, column].double()
        expected_image = found.sigma[column].double() * found.left[:, column].double()
        torch.testing.assert_close(image, expected_image, rtol=0, atol=1e-5 * expected[0].item())


def test_directions_without_a_singular_value_are_left_out():
    a, b = torch.randint(-3, 4, (2, 6, 1)).float(), torch.randint(-3, 4, (2, 1, 5)).float()
    sigma, left, right = decompose((a * b).sum(0), leading=4)  # exactly of rank 2
    assert (sigma > 0).tolist() == [True, True, False, False, False]
    assert (left.shape, right.shape) == ((6, 2), (5, 2))


def test_decompose_of_zero_has_no_directions():
    found = decompose(torch.zeros(4, 6), leading=3)
    assert found.sigma.tolist() == [0] * 4
    assert (found.left.shape, found.right.shape) == ((4, 0), (6, 0))


@pytest.mark.parametrize(("long", "k1"), [(11, 3), (13, 4)])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_project_kradapter_with_truncated_columns_is_near_the_best_of_many_searches(
    long, k1, num_terms
):
    k2 = -(-long // k1)
    matrix = torch.randn(4, long, dtype=torch.float64)
    best = []
    for row in matrix.numpy():

        def missed(x, row=row):
            v, u = x[: k2 * num_terms].reshape(k2, num_terms), x[k2 * num_terms :]
            difference = (v @ u.reshape(num_terms, k1)).reshape(-1)[:long] - row
            return difference @ difference

        starts = np.random.default_rng(0).normal(size=(8, (k1 + k2) * num_terms))
        best.append(
            min(scipy.optimize.minimize(missed, x, options={"maxiter": 60}).fun for x in starts)
        )
    u, v = project_kradapter(matrix, k1, num_terms=num_terms, refine=100)
    error = norm(khatri_rao_sum(u, v, (4, long)) - matrix)
    assert error <= 1.01 * norm(np.sqrt(best))
    torch.testing.assert_close(u.norm(dim=2), v.norm(dim=2))
