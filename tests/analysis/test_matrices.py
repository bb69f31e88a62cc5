import math

import numpy as np
import pytest
import torch
from helpers import write_clip
from safetensors.torch import load_file, save_file

from vlkr.analysis.matrices import (
    DEFAULT_MATRICES,
    MATRICES,
    load_weights,
    make_matrix,
    matrix_maker,
)
from vlkr.errors import VlkrError
from vlkr.functional import effective_rank

NAMES = [*MATRICES, "power-law:0.5"]


def make(name, rows=96, columns=64, seed=1):
    return make_matrix(name, rows, columns, seed)


def band(matrix, low, high):
    """Part of the energy between two frequencies, in cycles per row."""
    energy = np.abs(np.fft.rfft(matrix.numpy(), axis=1)) ** 2
    frequency = np.arange(energy.shape[1])
    inside = (frequency >= low) & (frequency <= high)
    return energy[:, inside].sum() / energy.sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (33, 33)])
def test_targets_have_their_shape_and_depend_on_the_seed_alone(name, shape):
    matrix = make(name, *shape)
    assert matrix.shape == shape
    assert matrix.dtype == torch.float32
    assert matrix.isfinite().all()
    assert torch.equal(matrix, make(name, *shape))
    assert not torch.equal(matrix, make(name, *shape, seed=2))


def test_the_default_targets_are_the_papers_six_without_aliasing():
    assert len(DEFAULT_MATRICES) == 6
    assert set(MATRICES) - set(DEFAULT_MATRICES) == {"high-frequency-aliased"}


def test_gaussian_and_sparse_entries():
    gaussian, sparse = make("gaussian", 500, 400), make("sparse", 500, 400)
    assert gaussian.mean().abs() < 0.01
    assert gaussian.var().item() == pytest.approx(1, abs=0.02)
    assert (sparse == 0).float().mean().item() == pytest.approx(0.9, abs=0.005)
    assert sparse[sparse != 0].var().item() == pytest.approx(100, rel=0.03)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_whitened_data_have_the_identity_for_covariance(shape):
    data = make("whitened", *shape).double().numpy()
    covariance = np.cov(data if shape[0] < shape[1] else data.T)
    np.testing.assert_allclose(covariance, np.eye(64), atol=1e-3)


def test_low_rank_keeps_a_quarter_of_a_normal_matrix():
    matrix = make("low-rank").double().numpy()
    normal = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).double().numpy()
    assert np.linalg.matrix_rank(matrix, tol=1e-3) == 16
    expected = np.linalg.svd(normal, compute_uv=False)[:16]
    found = np.linalg.svd(matrix, compute_uv=False)[:16]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_frequencies_lie_where_they_are_said_to():
    columns = 768
    low, high = (make(f"{n}-frequency", 200, columns) for n in ("low", "high"))
    assert band(low, 0, 101) > 0.97
    assert band(high, columns / 4 - 1, columns / 2) > 0.97
    aliased = make("high-frequency-aliased", 200, columns)
    for i in range(4):  # broadband: each quarter of the band has a good part of the energy
        assert 0.15 < band(aliased, 96 * i, 96 * (i + 1) - 1) < 0.35


def test_a_row_is_one_to_six_sinusoids():
    matrix = make("low-frequency", 400, 768)
    # Each has a mean square of a half, and there are 1 + 2.5 in the mean.
    assert matrix.square().mean().item() == pytest.approx(3.5 / 2, rel=0.1)


@pytest.mark.parametrize("exponent", [0, 0.5, 2])
def test_power_law_spectra(exponent):
    matrix = make(f"power-law:{exponent}").double().numpy()
    sigma = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(sigma / sigma[0], np.arange(1.0, 65) ** -exponent, rtol=1e-3)
    assert (matrix**2).mean() == pytest.approx(1, rel=1e-4)
    assert torch.equal(make("power-law"), make("power-law:1"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gausian", "did you mean 'gaussian'"),
        ("zzz", "known: gaussian, .*power-law:EXPONENT"),
        ("power-law:x", "'x' is not an exponent"),
        ("power-law:-1", "'-1' is not an exponent"),
        ("power-law:nan", "'nan' is not an exponent"),
    ],
)
def test_unknown_targets_are_named(name, message):
    with pytest.raises(VlkrError, match=message):
        matrix_maker(name)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


def test_weights_are_the_last_text_and_visual_in_proj_of_a_model(clip):
    stored = load_file(f"{clip.removeprefix('local-dir:')}/open_clip_model.safetensors")
    text = "transformer.resblocks.0.attn.in_proj_weight"
    visual = "visual.transformer.resblocks.1.attn.in_proj_weight"
    found = load_weights(clip)
    assert list(found) == [text, visual]
    assert all(torch.equal(found[name], stored[name]) for name in found)
    file = f"{clip.removeprefix('local-dir:')}/open_clip_model.safetensors"
    assert all(torch.equal(found[n], t) for n, t in load_weights(file).items())
    assert list(load_weights(file)) == [text, visual]
    named = load_weights(clip, tensor="visual.proj")
    assert torch.equal(named["visual.proj"], stored["visual.proj"])


def test_wrong_weights_are_named(clip, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3)}, file)
    assert load_weights(str(file), tensor="a.weight")["a.weight"].shape == (3, 4)
    with pytest.raises(VlkrError, match="name a weight with --tensor"):
        load_weights(str(file))
    with pytest.raises(VlkrError, match=r"no tensor 'a\.wight'; nearest: a\.weight"):
        load_weights(str(file), tensor="a.wight")
    with pytest.raises(VlkrError, match=r"a\.bias of .* is 3 torch\.float32, expected a matrix"):
        load_weights(str(file), tensor="a.bias")
    with pytest.raises(VlkrError, match="cannot read"):
        load_weights(str(tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_text("no")
    with pytest.raises(VlkrError, match="cannot read"):
        load_weights(str(tmp_path / "bad.safetensors"))


def test_power_law_exponents_meet_their_effective_rank():
    sigma = np.arange(1.0, 65) ** -0.5
    p = sigma / sigma.sum()
    expected = math.exp(-(p * np.log(p)).sum())
    assert effective_rank(make("power-law:0.5")).item() == pytest.approx(expected, rel=1e-4)
