"""The matrices to approximate: synthetic ones with known spectra, and weights of models."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from vlkr.errors import VlkrError
from vlkr.projections import project_lora

#: makes a matrix ``(rows, columns)``
Maker = Callable[[int, int, torch.Generator], Tensor]


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Returns independent standard normal entries."""
    return torch.randn(rows, columns, generator=generator)


def sparse(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Returns normal entries of which 90 % are zero and the others ten times as large."""
    kept = torch.rand(rows, columns, generator=generator) < 0.1
    return 10 * torch.randn(rows, columns, generator=generator) * kept


def whitened(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Returns centered normal data, PCA-whitened: all singular values are nearly equal."""
    if rows < columns:
        return whitened(columns, rows, generator).T
    data = torch.randn(rows, columns, generator=generator)
    data -= data.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(data.T))
    white: Tensor = (data @ vectors) / (values + 1e-5).sqrt()
    return white


def low_rank(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Returns a normal matrix whose smaller three quarters of singular values are zeroed."""
    normal = torch.randn(rows, columns, generator=generator)
    lora_a, lora_b = project_lora(normal, max(1, min(rows, columns) // 4))
    return lora_b @ lora_a


def low_frequency(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Returns rows of sinusoids of 1 to 100 cycles on 768 samples, scaled to other widths."""
    return frequencies(rows, columns, generator, 1, 100 * columns / 768)


def high_frequency(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Returns rows of sinusoids in the upper half of the band below the Nyquist frequency."""
    return frequencies(rows, columns, generator, columns / 4, columns / 2)


def high_frequency_aliased(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Returns the published "high frequency": 1,000 to 10,000 cycles on, say, 768 samples.

    All of them are above the 384 cycles that 768 samples can represent, so they alias to
    frequencies from the whole band and the matrix is broadband.
    """
    return frequencies(rows, columns, generator, 1000, 10000)


def frequencies(
    rows: int, columns: int, generator: torch.Generator, low: float, high: float
) -> Tensor:
    """Returns rows that each sum one to six sinusoids with frequencies in ``[low, high]``.

    Args:
        rows: number of sums; the first sinusoid's frequency rises evenly from row to row.
        columns: samples of the unit interval.
        generator: draws the phases, the number of further sinusoids and their frequencies.
        low: lowest frequency, in cycles per row.
        high: highest frequency.
    """
    time = torch.arange(columns, dtype=torch.float64) / columns
    phase = torch.rand(rows, 1, generator=generator)
    count = torch.randint(0, 6, (rows,), generator=generator)
    further = low + (high - low) * torch.rand(rows, 5, generator=generator)
    base = torch.linspace(low, high, rows, dtype=torch.float64)
    matrix = torch.sin(2 * torch.pi * base[:, None] * time + phase)
    for i in range(5):
        wave = torch.sin(2 * torch.pi * further[:, i : i + 1] * time)
        matrix += wave * (count > i)[:, None]
    return matrix.float()


def power_law(rows: int, columns: int, generator: torch.Generator, exponent: float) -> Tensor:
    """Returns random singular vectors with singular values ``i ** -exponent``, mean square 1."""
    short = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, short, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, short, generator=generator))[0]
    sigma = torch.arange(1, short + 1, dtype=torch.float64).pow(-exponent)
    sigma *= math.sqrt(rows * columns) / sigma.norm()
    matrix: Tensor = u * sigma.float() @ v.T
    return matrix


MATRICES: dict[str, Maker] = {
    "gaussian": gaussian,
    "sparse": sparse,
    "whitened": whitened,
    "low-rank": low_rank,
    "high-frequency": high_frequency,
    "low-frequency": low_frequency,
    "high-frequency-aliased": high_frequency_aliased,
}
DEFAULT_MATRICES = tuple(name for name in MATRICES if not name.endswith("aliased"))
_POWER_LAW = "power-law"


def matrix_maker(name: str) -> Maker:
    """Returns the function that makes a named matrix; ``power-law:0.5`` has the exponent 0.5.

    Raises:
        VlkrError: for an unknown name, or an exponent that is not a number of at least 0.
    """
    if name in MATRICES:
        return MATRICES[name]
    kind, _, value = name.partition(":")
    if kind == _POWER_LAW:
        try:
            exponent = float(value or 1)
        except ValueError:
            exponent = -1.0
        if not 0 <= exponent < math.inf:
            raise VlkrError(f"{value!r} is not an exponent of a power law, expected a number >= 0")
        return lambda rows, columns, generator: power_law(rows, columns, generator, exponent)
    known = [*MATRICES, f"{_POWER_LAW}:EXPONENT"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise VlkrError(f"unknown target {name!r}; {hint}")


def make_matrix(name: str, rows: int, columns: int, seed: int) -> Tensor:
    """Returns a named matrix ``(rows, columns)``, drawn with a seed."""
    return matrix_maker(name)(rows, columns, torch.Generator().manual_seed(seed))


def unit_scale(name: str, weight: Tensor) -> Tensor:
    """Scales a weight to a mean square of 1, which the synthetic matrices have.

    Raises:
        VlkrError: if it is zero or not finite.
    """
    scale = weight.square().mean().sqrt()
    if not (torch.isfinite(scale) and scale > 0):
        raise VlkrError(f"{name} is zero or not finite; there is nothing to approximate")
    return weight / scale


def load_weights(
    source: str, pretrained: str | None = None, tensor: str | None = None
) -> dict[str, Tensor]:
    """Returns weights of a model or a safetensors file by name, as fp32 matrices.

    Args:
        source: a ``.safetensors`` file, or a model's name as ``--model`` takes it.
        pretrained: open_clip's tag, for a model.
        tensor: the weight's name; by default the last text and visual ``in_proj_weight``.

    Raises:
        VlkrError: if there is no such weight, or it is not a matrix.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        state = _read_safetensors(path, tensor)
    else:
        from vlkr.models.clip import load_clip  # imports open_clip

        state = load_clip(source, pretrained).model.state_dict()
    if tensor is None:
        fused = [name for name in state if name.endswith("in_proj_weight")]
        text = [name for name in fused if not name.startswith("visual.")]
        visual = [name for name in fused if name.startswith("visual.")]
        names = [*text[-1:], *visual[-1:]]
        if not names:
            raise VlkrError(f"{source} has no in_proj_weight; name a weight with --tensor")
    elif tensor in state:
        names = [tensor]
    else:
        near = difflib.get_close_matches(tensor, list(state), n=3, cutoff=0.3) or list(state)[:3]
        raise VlkrError(f"{source} has no tensor {tensor!r}; nearest: {', '.join(near)}")
    for name in names:
        if state[name].ndim != 2 or not state[name].is_floating_point():
            shape = "x".join(map(str, state[name].shape))
            raise VlkrError(f"{name} of {source} is {shape} {state[name].dtype}, expected a matrix")
    return {name: state[name].detach().float() for name in names}


def _read_safetensors(path: Path, tensor: str | None) -> dict[str, Tensor]:
    """Reads the tensors that may be selected; the others are empty."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {
                name: file.get_tensor(name)
                if name == tensor or (tensor is None and name.endswith("in_proj_weight"))
                else torch.empty(0)
                for name in file.keys()  # noqa: SIM118  (a file is not a mapping)
            }
    except (OSError, SafetensorError) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error
