import numpy as np
import pytest
import scipy.linalg
import torch

from vlkr.approximation.measures import approximation_measures, target_measures
from vlkr.functional import decompose

K = 4


def numpy_measures(found, target):
    """Each measure from numpy's own SVD."""
    found, target = found.double().numpy(), target.double().numpy()
    u, s, vh = np.linalg.svd(found, full_matrices=False)
    tu, ts, tvh = np.linalg.svd(target, full_matrices=False)
    rank = min(K, int((s > 1e-7 * s[0]).sum())) if s[0] > 0 else 0
    # Missing directions have a cosine of 0.
    cosines = [
        (np.cos(scipy.linalg.subspace_angles(a[:, :rank], b[:, :K])) ** 2).sum() / K
        if rank
        else 0.0
        for a, b in ((u, tu), (vh.T, tvh.T))
    ]
    return {
        "sigma_difference": np.abs(s - ts).mean(),
        "frobenius": np.linalg.norm(found - target),
        "relative_frobenius": np.linalg.norm(found - target) / np.linalg.norm(target),
        "spectral_error": np.linalg.norm(found - target, 2) / np.linalg.norm(target, 2),
        "subspace_error": 1 - np.mean(cosines),
    }


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 12)])
@pytest.mark.parametrize("kind", ["near", "far", "rank 2", "zero"])
def test_measures_are_numpys(kind, shape):
    target = torch.randn(shape)
    found = {
        "near": target + 0.1 * torch.randn(shape),
        "far": torch.randn(shape),
        "rank 2": torch.randn(shape[0], 2) @ torch.randn(2, shape[1]),
        "zero": torch.zeros(shape),
    }[kind]
    measures = approximation_measures(found, target, decompose(found, K), decompose(target, K))
    for name, expected in numpy_measures(found, target).items():
        assert measures[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    nuclear = np.linalg.norm(found.numpy(), "nuc")
    assert measures["nuclear_norm"] == pytest.approx(nuclear, rel=1e-4)
    assert all(np.isfinite(list(measures.values())))


def test_a_perfect_approximation_has_no_error():
    target = torch.randn(9, 7)
    known = decompose(target, K)
    measures = approximation_measures(target, target, known, known)
    for name in ("sigma_difference", "frobenius", "spectral_error"):
        assert measures[name] == 0
    assert measures["subspace_error"] == pytest.approx(0, abs=1e-5)


def test_equal_spectra_with_other_vectors_are_seen_by_all_but_the_sigma_difference():
    target = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1]))
    found = target.roll(2, 0)
    measures = approximation_measures(found, target, decompose(found, 2), decompose(target, 2))
    assert measures["sigma_difference"] == pytest.approx(0, abs=1e-6)
    assert measures["relative_frobenius"] == pytest.approx(2**0.5)
    assert measures["subspace_error"] == pytest.approx(0.5)


def test_target_measures_of_an_orthogonal_matrix():
    measures = target_measures(decompose(2 * torch.linalg.qr(torch.randn(8, 8))[0], K))
    assert measures["effective_rank"] == pytest.approx(8, rel=1e-5)
    assert measures["nuclear_norm"] == pytest.approx(16, rel=1e-5)
