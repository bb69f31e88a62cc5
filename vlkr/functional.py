"""Tensors in, tensors out: the mathematics of the adapters, free of modules."""

from __future__ import annotations

import torch
from torch import Tensor


def khatri_rao(u: Tensor, v: Tensor) -> Tensor:
    """Row-wise Khatri-Rao product: row ``i`` is the Kronecker product of ``v[i]`` and ``u[i]``.

    Entry ``(i, q * k1 + p)`` is ``v[i, q] * u[i, p]``. Its rank reaches ``min(m, k1 * k2)`` for
    generic factors (KRAdapter, arXiv 2508.00230, section 3).

    Args:
        u: ``(m, k1)``.
        v: ``(m, k2)``.

    Returns:
        ``(m, k1 * k2)``.

    >>> khatri_rao(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    tensor([[ 3.,  6.,  5., 10.]])
    """
    return (v.unsqueeze(2) * u.unsqueeze(1)).flatten(1)


def effective_rank(matrix: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Args:
        matrix: ``(..., m, n)``.

    Returns:
        ``(...)``, between 1 and ``min(m, n)``; 0 for a zero matrix.

    >>> effective_rank(torch.eye(4)).round().item(), effective_rank(torch.zeros(4, 4)).item()
    (4.0, 0.0)
    """
    sigma = torch.linalg.svdvals(matrix.float() if matrix.dtype != torch.float64 else matrix)
    total = sigma.sum(-1, keepdim=True)
    p = torch.where(total > 0, sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total.squeeze(-1) > 0, rank, torch.zeros_like(rank))


def stable_rank(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm over the squared spectral norm.

    Args:
        matrix: ``(..., m, n)``.

    Returns:
        ``(...)``, between 1 and ``min(m, n)``; 0 for a zero matrix.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0]))).item()
    1.25
    """
    sigma = torch.linalg.svdvals(matrix.float() if matrix.dtype != torch.float64 else matrix)
    largest = sigma[..., :1]
    ratio = torch.where(largest > 0, sigma / largest.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)
    return ratio.square().sum(-1)
