"""Functions of tensors that adapters and their analysis are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlkr.errors import VlkrError


def khatri_rao(u: Tensor, v: Tensor) -> Tensor:
    """Row-wise Khatri-Rao product: row ``i`` is the Kronecker product of ``v[i]`` and ``u[i]``.

    Entry ``(i, q * k1 + p)`` is ``v[i, q] * u[i, p]``. Its rank reaches ``min(m, k1 * k2)`` for
    generic factors (KRAdapter, arXiv 2508.00230, section 3).

    Args:
        u: ``(..., m, k1)``.
        v: ``(..., m, k2)``.

    Returns:
        ``(..., m, k1 * k2)``.

    >>> khatri_rao(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    tensor([[ 3.,  6.,  5., 10.]])
    """
    return (v.unsqueeze(-1) * u.unsqueeze(-2)).flatten(-2)


def add_khatri_rao(base: Tensor, u: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """Writes ``base + scale * khatri_rao(u, v)`` into ``out`` in one pass, without temporaries.

    The product is cut to the columns of ``base``. The tensors must not require gradients.

    Args:
        base: ``(m, n)``, may be ``out`` itself.
        u: ``(m, k1)``.
        v: ``(m, k2)``, with ``k1 * k2 >= n``.
        scale: multiplies the product.
        out: ``(m, n)``, in any memory layout.

    >>> out = torch.empty(1, 3)
    >>> add_khatri_rao(torch.ones(1, 3), torch.ones(1, 2), torch.tensor([[3.0, 5.0]]), 2.0, out)
    >>> out
    tensor([[ 7.,  7., 11.]])
    """
    if out.stride(0) < out.stride(1):  # factors in the layout of what is written
        u, v = u.T.contiguous().T, v.T.contiguous().T
    blocks, whole = _row_blocks(base, u.shape[1])
    torch.addcmul(
        blocks, v[:, : blocks.shape[1], None], u[:, None], value=scale,
        out=_row_blocks(out, u.shape[1])[0],
    )  # fmt: skip
    if whole < base.shape[1]:
        rest, last = base[:, whole:], v[:, blocks.shape[1], None]
        torch.addcmul(rest, last, u[:, : rest.shape[1]], value=scale, out=out[:, whole:])


def khatri_rao_gradients(grad: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of ``u`` and ``v`` from that of ``khatri_rao(u, v)``.

    Takes two matrix-vector products per row; autograd would allocate two tensors of that size.

    Args:
        grad: ``(m, n)``, of the product cut to its first ``n`` columns.
        u: ``(m, k1)``.
        v: ``(m, k2)``.

    Returns:
        The gradients, of the shapes of ``u`` and ``v``.

    >>> u, v = torch.ones(1, 2), torch.tensor([[3.0, 5.0]])
    >>> khatri_rao_gradients(torch.ones(1, 4), u, v)
    (tensor([[8., 8.]]), tensor([[2., 2.]]))
    """
    blocks, whole = _row_blocks(grad, u.shape[1])
    count = blocks.shape[1]
    grad_u = torch.bmm(v[:, None, :count], blocks).squeeze(1)
    grad_v = torch.zeros_like(v)
    grad_v[:, :count] = torch.bmm(blocks, u.unsqueeze(-1)).squeeze(-1)
    if whole < grad.shape[1]:
        rest = grad[:, whole:]
        grad_u[:, : rest.shape[1]].addcmul_(rest, v[:, count, None])
        grad_v[:, count] = (rest * u[:, : rest.shape[1]]).sum(1)
    return grad_u, grad_v


def _row_blocks(matrix: Tensor, size: int) -> tuple[Tensor, int]:
    """View ``(m, count, size)`` of the complete blocks of the rows, and their columns."""
    count = matrix.shape[1] // size
    return matrix[:, : count * size].unflatten(1, (count, size)), count * size


def singular_values(matrix: Tensor) -> Tensor:
    """Returns singular values, ``(..., m, n)`` to ``(..., min(m, n))``, in fp32 or wider."""
    sigma: Tensor = torch.linalg.svdvals(_at_least_fp32(matrix))
    return sigma


def effective_rank(matrix: Tensor) -> Tensor:
    """Exponential of the entropy of the normalized singular values (Roy and Vetterli, 2007).

    Maps ``(..., m, n)`` to ``(...)``, between 1 and ``min(m, n)``; 0 for a zero matrix.

    >>> effective_rank(torch.eye(4)).round().item(), effective_rank(torch.zeros(4, 4)).item()
    (4.0, 0.0)
    """
    return spectrum_measures(singular_values(matrix))["effective_rank"]


def stable_rank(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm, as :func:`effective_rank` otherwise.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0]))).item()
    1.25
    """
    return spectrum_measures(singular_values(matrix))["stable_rank"]


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of the singular values, ``(..., m, n)`` to ``(...)``.

    >>> nuclear_norm(torch.diag(torch.tensor([2.0, 1.0]))).item()
    3.0
    """
    return spectrum_measures(singular_values(matrix))["nuclear_norm"]


def spectrum_measures(sigma: Tensor) -> dict[str, Tensor]:
    """Returns the ranks and norms of a matrix from its singular values.

    Args:
        sigma: singular values ``(..., n)``, in descending order.

    Returns:
        ``effective_rank``, ``stable_rank``, ``nuclear_norm``, ``frobenius_norm`` and
        ``spectral_norm``, each ``(...)`` and each 0 for a zero matrix.

    >>> {k: round(v.item(), 3) for k, v in spectrum_measures(torch.tensor([2.0, 1.0])).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'effective_rank': 1.89, 'stable_rank': 1.25, 'nuclear_norm': 3.0, 'frobenius_norm': 2.236,
     'spectral_norm': 2.0}
    """
    # Scaled by the largest, so that neither squares nor sums leave the range of the dtype.
    largest = sigma[..., :1]
    relative = torch.where(largest > 0, sigma / torch.where(largest > 0, largest, 1), 0)
    total = relative.sum(-1, keepdim=True)
    p = relative / total.clamp_min(1)
    energy = relative.square().sum(-1)
    return {
        "effective_rank": torch.special.entr(p).sum(-1).exp() * (energy > 0),
        "stable_rank": energy,
        "nuclear_norm": sigma.sum(-1),
        "frobenius_norm": energy.sqrt() * largest.squeeze(-1),
        "spectral_norm": largest.squeeze(-1),
    }


class Decomposition(NamedTuple):
    """Singular values ``(min(m, n))`` and leading singular vectors ``(m, k)`` and ``(n, k)``."""

    sigma: Tensor
    left: Tensor
    right: Tensor


def decompose(matrix: Tensor, leading: int) -> Decomposition:
    """Returns singular values and leading subspaces from the Gram matrix, faster than an SVD.

    The Gram matrix of an ill-conditioned matrix is computed in fp64. So the relative error of
    singular values is about 1e-4 if none is small, else their error is 1e-8 of the largest one.
    Directions whose singular value is 0 by that measure are left out.

    Args:
        matrix: ``(m, n)``.
        leading: maximum number of singular vectors.

    >>> sigma, left, right = decompose(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), leading=2)
    >>> sigma.tolist(), left.shape, right.shape
    ([3.0, 0.0], torch.Size([2, 1]), torch.Size([2, 1]))
    """
    matrix = _at_least_fp32(matrix)
    if matrix.shape[0] < matrix.shape[1]:
        sigma, right, left = decompose(matrix.T, leading)
        return Decomposition(sigma, left, right)
    # Scaled, so that squares stay within the range of the dtype.
    scale = matrix.abs().amax()
    scaled = matrix / torch.where(scale > 0, scale, 1)
    values, vectors = torch.linalg.eigh(scaled.T @ scaled)
    if not values[0] > 1e-4 * values[-1]:
        scaled = scaled.double()
        values, vectors = torch.linalg.eigh(scaled.T @ scaled)
    sigma = values.flip(0).clamp_min(0).sqrt()
    sigma = torch.where(sigma > 1e-7 * sigma[0], sigma, 0)
    count = int((sigma[:leading] > 0).sum())
    right = vectors.flip(1)[:, :count]
    left = scaled @ right / sigma[:count]
    return Decomposition(*(t.to(matrix.dtype) for t in (sigma * scale, left, right)))


def subspace_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared cosine of the principal angles between two subspaces.

    Args:
        a: orthonormal columns ``(..., n, k)``.
        b: orthonormal columns ``(..., n, j)``.

    Returns:
        ``(...)``: 1 if the smaller subspace is part of the other one, 0 if they are orthogonal,
        ``max(j, k) / n`` on average for random ones.

    >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]).item()
    0.5
    """
    return (a.mT @ b).square().sum((-2, -1)) / min(a.shape[-1], b.shape[-1])


def project_lora(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the best approximation of a given rank (Eckart and Young, 1936).

    Args:
        matrix: ``(out_features, in_features)``.
        rank: at least 1; columns beyond ``min(out_features, in_features)`` are zero.

    Returns:
        ``lora_A (rank, in_features)`` and ``lora_B (out_features, rank)`` of equal norms, such
        that ``lora_B @ lora_A`` is the approximation.

    Raises:
        VlkrError: if ``rank`` is below 1.

    >>> a, b = project_lora(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
    >>> torch.linalg.matrix_norm(b @ a - torch.diag(torch.tensor([3.0, 2.0, 1.0]))).item()
    1.0
    """
    if rank < 1:
        raise VlkrError(f"rank {rank} is too small, expected at least 1")
    lora_b, lora_a = _best_low_rank(matrix, rank)
    return lora_a, lora_b


def project_kradapter(
    matrix: Tensor, k1: int, *, num_terms: int = 1, refine: int = 20
) -> tuple[Tensor, Tensor]:
    """Returns the best approximation by a sum of row-wise Khatri-Rao products.

    Each row of the short side, reshaped to ``(k2, k1)``, is a sum of ``num_terms`` outer products
    of its own, so its truncated SVD is the optimum: a KRAdapter (arXiv 2508.00230) in closed form.
    This is exact if ``k1`` divides the long side. Otherwise the last row of each reshaped matrix
    has entries that are truncated away, hence free. Then alternating least squares over the other
    entries starts from the SVD with zeros there and from its next singular vectors, and the best
    result for each row is kept; its error is an upper bound on the optimum's.

    Args:
        matrix: ``(out_features, in_features)`` with sides ``m <= M``.
        k1: columns of ``u``; ``k2 = ceil(M / k1)``.
        num_terms: number of products in the sum.
        refine: sweeps of least squares where entries are free; 0 keeps the SVD with zeros.

    Returns:
        ``u (num_terms, m, k1)`` and ``v (num_terms, m, k2)`` of equal norms, such that
        ``sum(khatri_rao(u[r], v[r]) for r)``, cut to ``M`` columns and transposed if
        ``out_features > in_features``, is the approximation.

    Raises:
        VlkrError: unless ``1 <= k1 <= M`` and ``num_terms >= 1``.

    >>> u, v = torch.randn(3, 2), torch.randn(3, 4)
    >>> nearest_u, nearest_v = project_kradapter(khatri_rao(u, v), k1=2)
    >>> torch.allclose(khatri_rao(nearest_u[0], nearest_v[0]), khatri_rao(u, v), atol=1e-5)
    True
    """
    matrix = _at_least_fp32(matrix)
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    short, long = rows.shape
    if not 1 <= k1 <= long:
        raise VlkrError(f"k1 {k1} is out of range, expected 1 to {long}")
    if num_terms < 1:
        raise VlkrError(f"num_terms {num_terms} is too small, expected at least 1")
    k2 = math.ceil(long / k1)
    grid = torch.nn.functional.pad(rows, (0, k1 * k2 - long)).view(short, k2, k1)
    if k1 * k2 == long or refine == 0:
        left, right = _best_low_rank(grid, num_terms)
    else:
        left, right = _low_rank_with_free_end(grid, num_terms, k1 * k2 - long, refine)
    return right.transpose(0, 1).contiguous(), left.permute(2, 0, 1).contiguous()


def project_kronecker(
    matrix: Tensor, left_shape: Sequence[int], *, num_terms: int = 1
) -> tuple[Tensor, Tensor]:
    """Returns the best approximation by a sum of Kronecker products (Van Loan and Pitsianis, 1993).

    With the blocks of ``matrix`` as rows each product is a rank-1 matrix, so the truncated SVD is
    the optimum in the Frobenius norm.

    Args:
        matrix: ``(out_features, in_features)``.
        left_shape: ``(rows, columns)`` of the left factors, which divide those of ``matrix``.
        num_terms: number of products in the sum.

    Returns:
        ``left (num_terms, *left_shape)`` and ``right`` with the remaining sizes, of equal norms,
        such that ``sum(torch.kron(left[r], right[r]) for r)`` is the approximation.

    Raises:
        VlkrError: if ``left_shape`` does not divide the matrix, or ``num_terms`` is below 1.

    >>> left, right = project_kronecker(torch.kron(torch.eye(2), torch.ones(3, 2)), (2, 2))
    >>> torch.allclose(torch.kron(left[0], right[0]), torch.kron(torch.eye(2), torch.ones(3, 2)))
    True
    """
    rows, columns = left_shape
    out_features, in_features = matrix.shape
    if rows < 1 or columns < 1 or out_features % rows or in_features % columns:
        raise VlkrError(
            f"a left factor {rows}x{columns} does not divide a matrix {out_features}x{in_features}"
        )
    if num_terms < 1:
        raise VlkrError(f"num_terms {num_terms} is too small, expected at least 1")
    height, width = out_features // rows, in_features // columns
    blocks = matrix.reshape(rows, height, columns, width).transpose(1, 2)
    left, right = _best_low_rank(blocks.reshape(rows * columns, height * width), num_terms)
    return left.T.reshape(-1, rows, columns), right.reshape(-1, height, width)


def _best_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``(..., m, rank)`` and ``(..., rank, n)``, with zeros beyond ``min(m, n)``."""
    u, sigma, vh = torch.linalg.svd(_at_least_fp32(matrix), full_matrices=False)
    root = sigma.sqrt()
    left, right = u * root.unsqueeze(-2), root.unsqueeze(-1) * vh
    missing = max(0, rank - sigma.shape[-1])
    left = torch.nn.functional.pad(left[..., :rank], (0, missing))
    return left, torch.nn.functional.pad(right[..., :rank, :], (0, 0, 0, missing))


def _low_rank_with_free_end(
    matrix: Tensor, rank: int, free: int, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Low-rank approximation of ``(batch, m, n)`` whose last ``free < n`` entries do not count.

    Returns factors ``(batch, m, rank)`` and ``(batch, rank, n)``, whose error is at most that of
    the SVD, after ``sweeps`` of alternating least squares from each initialization.
    """
    seen = matrix.shape[2] - free

    def error(left: Tensor, right: Tensor) -> Tensor:
        difference = left @ right - matrix
        difference[:, -1, seen:] = 0
        return difference.square().sum((1, 2))

    def sweep(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        crossed, last = matrix @ right.mT, right[..., :seen]
        rows = _solve(right @ right.mT, crossed[:, :-1].mT)
        left = torch.cat([rows, _solve(last @ last.mT, crossed[:, -1:].mT)], 2).mT
        crossed, gram = left.mT @ matrix, left.mT @ left
        columns = _solve(gram - left[:, -1:].mT @ left[:, -1:], crossed[..., seen:])
        return left, torch.cat([_solve(gram, crossed[..., :seen]), columns], 2)

    # The last of the leading singular vectors is replaced by each of the next ones; the best of
    # these initializations is swept again.
    lefts, rights = _best_low_rank(matrix, rank + 3)
    best_left, best_right = lefts[..., :rank], rights[:, :rank]
    best = error(best_left, best_right)
    for last in (rank - 1, rank, rank + 1, rank + 2, None):
        left, right = best_left, best_right
        if last is not None:
            chosen = [*range(rank - 1), last]
            left, right = lefts[..., chosen], rights[:, chosen]
        for _ in range(sweeps):
            left, right = sweep(left, right)
        current = error(left, right)
        better = (current < best)[:, None, None]
        best_left = torch.where(better, left, best_left)
        best_right = torch.where(better, right, best_right)
        best = torch.minimum(current, best)
    # Equal norms of each term, as with the SVD.
    sizes = best_left.norm(dim=1), best_right.norm(dim=2)
    root = (sizes[0] * sizes[1]).sqrt()
    left_scale, right_scale = (root / torch.where(size > 0, size, 1) for size in sizes)
    return best_left * left_scale.unsqueeze(1), best_right * right_scale.unsqueeze(2)


def _solve(gram: Tensor, values: Tensor) -> Tensor:
    """Solves small symmetric systems, singular ones with a small ridge."""
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    ridge = torch.finfo(gram.dtype).eps * size + torch.finfo(gram.dtype).tiny
    if gram.shape[-1] == 1:
        return values / (gram + ridge)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve_ex(gram + ridge * eye, values)[0]
    return solution


def _at_least_fp32(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
