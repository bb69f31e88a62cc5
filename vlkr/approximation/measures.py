"""What an approximation keeps of its target."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkr.functional import Decomposition, spectrum_measures, subspace_overlap

#: dimensions of the leading subspaces that are compared.
LEADING = 16


def frobenius(matrix: Tensor) -> float:
    """Frobenius norm, summed in fp64 so that close errors can be told apart."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def target_measures(target: Decomposition) -> dict[str, float]:
    """Ranks and norms of a target."""
    return {name: float(value) for name, value in spectrum_measures(target.sigma).items()}


def approximation_measures(
    approximation: Tensor, target: Tensor, found: Decomposition, expected: Decomposition
) -> dict[str, float]:
    """Errors of an approximation, and its own ranks and norms.

    ``sigma_difference`` is the mean absolute difference of the sorted singular values, published
    as "nuclear error"; it is blind to singular vectors. ``spectral_error`` and
    ``relative_frobenius`` are norms of the difference over the target's. ``subspace_error`` is 1
    less the mean squared cosine between the leading singular subspaces, the mean of left and right;
    where the target's spectrum is flat, its leading subspace is arbitrary and this is near 1.

    Args:
        approximation: ``(m, n)``.
        target: ``(m, n)``, not zero.
        found: decomposition of the approximation.
        expected: decomposition of the target.
    """
    difference = approximation - target
    norm = frobenius(difference)
    gram = (
        difference.T @ difference
        if difference.shape[0] > difference.shape[1]
        else (difference @ difference.T)
    )
    spectral = float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())
    overlap = sum(
        float(subspace_overlap(a, b)) * a.shape[1] / b.shape[1] if a.shape[1] else 0.0
        for a, b in ((found.left, expected.left), (found.right, expected.right))
    )
    return {
        "sigma_difference": float((found.sigma - expected.sigma).abs().mean()),
        "frobenius": norm,
        "relative_frobenius": norm / frobenius(target),
        "spectral_error": spectral / float(expected.sigma[0]),
        "subspace_error": max(0.0, 1 - overlap / 2),
        **{name: float(value) for name, value in spectrum_measures(found.sigma).items()},
    }
