"""Closed-form projections of a matrix onto what an adapter method can represent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlkr.errors import VlkrError
from vlkr.functional import at_least_fp32


def project_lora(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the best approximation of a rank in the Frobenius norm (Eckart and Young, 1936).

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
    """Returns the best Frobenius approximation by a sum of row-wise Khatri-Rao products.

    Each row of the short side, reshaped to ``(k2, k1)``, is a sum of ``num_terms`` outer products
    of its own, so its truncated SVD is the optimum: a KRAdapter (arXiv 2508.00230) in closed form.
    This is exact if ``k1`` divides the long side. Otherwise the last row of each reshaped matrix
    has entries that are truncated away, hence free. Then alternating least squares over the other
    entries starts from the SVD with zeros there and from its next singular vectors, and the best
    result of each row is kept; its error is an upper bound on the optimum's.

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

    >>> from vlkr.functional import khatri_rao
    >>> u, v = torch.randn(3, 2), torch.randn(3, 4)
    >>> found = project_kradapter(khatri_rao(u, v), k1=2)
    >>> torch.allclose(khatri_rao(found[0][0], found[1][0]), khatri_rao(u, v), atol=1e-5)
    True
    """
    matrix = at_least_fp32(matrix)
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

    Each product is a rank-1 matrix after the blocks of ``matrix`` are laid out as rows, so the
    truncated SVD there is the optimum in the Frobenius norm.

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
    """Returns ``(..., m, rank)`` and ``(..., rank, n)``, padded with zeros beyond ``min(m, n)``."""
    u, sigma, vh = torch.linalg.svd(at_least_fp32(matrix), full_matrices=False)
    root = sigma.sqrt()
    left, right = u * root.unsqueeze(-2), root.unsqueeze(-1) * vh
    missing = max(0, rank - sigma.shape[-1])
    left = torch.nn.functional.pad(left[..., :rank], (0, missing))
    return left, torch.nn.functional.pad(right[..., :rank, :], (0, 0, 0, missing))


def _low_rank_with_free_end(
    matrix: Tensor, rank: int, free: int, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Returns a low-rank approximation that ignores the last ``free`` entries, which are 0.

    Args:
        matrix: ``(batch, m, n)``.
        rank: rank of the approximation.
        free: entries at the end of the last row, fewer than ``n``.
        sweeps: sweeps of alternating least squares from each start.

    Returns:
        ``(batch, m, rank)`` and ``(batch, rank, n)``, whose error is at most that of the SVD.
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

    # Each start replaces the last leading singular vector by a later one; the best is refined.
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
