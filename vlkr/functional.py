"""Functions of tensors that adapters and their analysis are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    sigma: Tensor = torch.linalg.svdvals(at_least_fp32(matrix))
    return sigma


def effective_rank(matrix: Tensor) -> Tensor:
    """Exponential of the entropy of the normalized singular values (Roy and Vetterli, 2007).

    Args:
        matrix: ``(..., m, n)``.

    Returns:
        ``(...)``, between 1 and ``min(m, n)``; 0 for a zero matrix.

    >>> effective_rank(torch.eye(4)).round().item(), effective_rank(torch.zeros(4, 4)).item()
    (4.0, 0.0)
    """
    return spectrum_measures(singular_values(matrix))["effective_rank"]


def stable_rank(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm over the squared spectral norm.

    Args:
        matrix: ``(..., m, n)``.

    Returns:
        ``(...)``, between 1 and ``min(m, n)``; 0 for a zero matrix.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0]))).item()
    1.25
    """
    return spectrum_measures(singular_values(matrix))["stable_rank"]


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of the singular values.

    Args:
        matrix: ``(..., m, n)``.

    Returns:
        ``(...)``.

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
    matrix = at_least_fp32(matrix)
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


def at_least_fp32(matrix: Tensor) -> Tensor:
    """Returns the matrix in its dtype or, if that is narrower, in fp32."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
