import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

from vlkr.analysis.benchmark import approximate, approximation_measures, spectrum_numbers
from vlkr.analysis.matrices import DEFAULT_MATRICES, make_matrix
from vlkr.analysis.methods import DEFAULT_METHODS
from vlkr.cli import main
from vlkr.errors import VlkrError
from vlkr.functional import decompose

SMALL = {"out_features": 24, "in_features": 16, "iterations": 40, "device": "cpu"}
CLOSED = {"lora", "kradapter", "kradapter:balanced", "krona"}


def numbers(value):
    """Every number in a nested structure."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture(scope="module")
def table():
    """The whole default table on small matrices."""
    return approximate(**SMALL, seeds=2)


def test_the_default_table_is_whole_and_finite(table):
    found = table.to_json()
    pairs = [(row["target"], row["method"]) for row in found["rows"]]
    assert pairs == [(t, m) for t in DEFAULT_MATRICES for m in DEFAULT_METHODS]
    assert all(math.isfinite(n) for n in numbers(found))
    assert all(len(row["trained"]) == 2 for row in found["rows"])
    assert all(bool(row["optima"]) == (row["method"] in CLOSED) for row in found["rows"])
    assert all(math.isfinite(s) for row in table.rows for s in row.spectrum)


def test_closed_forms_never_exceed_trained_errors(table):
    for row in table.rows:
        for optimum, error in zip(row.optima, row.values("relative_frobenius"), strict=False):
            assert optimum <= error * (1 + 1e-5), (row.target, row.method)


def test_the_same_seeds_give_the_same_table(table):
    again = approximate(["sparse"], ["randlora", "kradapter"], **SMALL, seeds=2)
    for row in again.rows:
        for seed, measures in zip(
            table.row("sparse", row.method).trained, row.trained, strict=True
        ):
            assert measures == pytest.approx(seed, rel=1e-3, abs=1e-3)


def test_figures_are_those_of_the_approximation(table):
    row = table.row("gaussian", "lora")
    target = make_matrix("gaussian", 24, 16, seed=1)
    sigma = torch.linalg.svdvals(target)
    rank = row.options["rank"]
    best = (sigma[rank:].square().sum() / sigma.square().sum()).sqrt().item()
    assert row.optima[0] == pytest.approx(best, rel=1e-4)
    assert row.parameters == rank * (24 + 16)
    spectrum = torch.tensor(row.spectrum)
    assert row.trained[0]["sigma_difference"] == pytest.approx(
        (spectrum - sigma).abs().mean().item(), rel=1e-3
    )


def test_without_iterations_there_are_closed_forms_alone(tmp_path):
    found = approximate(
        ["power-law:1"], **(SMALL | {"iterations": 0}), seeds=1, output=tmp_path / "out"
    )
    assert all(row.trained == [] for row in found.rows)
    assert {row.method for row in found.rows if row.optima} == CLOSED
    assert not (tmp_path / "out" / "spectra.png").exists()
    assert (tmp_path / "out" / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert [table.title for table in found.tables()] == [
        "Relative Frobenius error of the optimum in closed form",
        "Effective rank",
        "Approximation of matrices",
    ]


def test_more_terms_mean_more_budget_for_all_and_less_error():
    found = [
        approximate(["gaussian"], ["lora", "kradapter", "krona"], **SMALL, seeds=1, num_terms=n)
        for n in (1, 2)
    ]
    for one, two in zip(found[0].rows, found[1].rows, strict=True):
        assert two.parameters == pytest.approx(2 * one.parameters, rel=0.2)
        assert two.optima[0] < one.optima[0]


def test_authors_protocol_has_its_own_methods_and_targets():
    found = approximate(
        protocol="authors", out_features=144, in_features=110, iterations=3, seeds=1, device="cpu"
    )
    assert len(found.targets) == 6
    assert "high-frequency-aliased" in found.targets
    methods = [row.method for row in found.rows[:5]]
    assert methods == ["LoRA", "SinLoRA", "KRAdapter", "RandLoRA", "Kronecker"]
    with pytest.raises(VlkrError, match="leave --methods out"):
        approximate(methods=["lora"], protocol="authors")


def test_weights_are_scaled_and_alone(tmp_path, small):
    clip = small
    found = approximate(weights=clip, methods=["lora"], iterations=3, seeds=1, device="cpu")
    assert [name.rpartition(".")[2] for name in found.targets] == ["in_proj_weight"] * 2
    for (measures,), row in zip(found.targets.values(), found.rows, strict=True):
        width = {"tr": 16, "vi": 32}[row.target[:2]]
        assert measures["frobenius_norm"] == pytest.approx(width * 3**0.5, rel=1e-4)
        assert row.options["rank"] >= 1
    save_file({"w": torch.zeros(8, 6)}, tmp_path / "w.safetensors")
    with pytest.raises(VlkrError, match="w is zero or not finite"):
        approximate(weights=str(tmp_path / "w.safetensors"), tensor="w")
    both = approximate(["gaussian"], ["lora"], clip, **SMALL, seeds=1)
    assert len(both.targets) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds 0 is too small"),
        ({"iterations": -1}, "iterations -1 is too small"),
        ({"out_features": 1}, "out_features 1 is too small"),
        ({"num_terms": 0}, "num_terms 0 is too small"),
        ({"lr": 0.0}, "lr 0.0 is out of range"),
        ({"targets": ["gausian"]}, "did you mean 'gaussian'"),
        ({"methods": ["lorra"]}, "did you mean 'lora'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(VlkrError, match=message):
        approximate(**(SMALL | options))


def test_dora_approximates_from_a_random_base_weight():
    (row,) = approximate(["low-rank"], ["dora"], **(SMALL | {"iterations": 200}), seeds=2).rows
    assert row.parameters == row.options["rank"] * (24 + 16) + 24
    assert row.optima == []
    # Low-rank updates and new row norms do not make this target, but more than nothing.
    assert all(0.2 < error < 0.95 for error in row.values("relative_frobenius"))


def test_divergence_is_named():
    with pytest.raises(VlkrError, match="lora diverged on gaussian"):
        approximate(["gaussian"], ["lora"], **(SMALL | {"lr": 1e30}), seeds=1)


@pytest.mark.parametrize("config", ["paper", "closed_form"])
def test_configs_run(config, tmp_path, capsys):
    output = tmp_path / "out"
    small = ["--out-features", "144", "--in-features", "110", "--seeds", "1"]
    arguments = ["approximate", "--config", f"configs/approximate/{config}.yaml", *small]
    if config == "paper":
        arguments += ["--iterations", "3"]
    assert main([*arguments, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert ("Frobenius error, trained" in shown) == (config == "paper")
    found = json.loads((output / "results.json").read_text())
    assert len(found["targets"]) == {"paper": 6, "closed_form": 7}[config]
    assert (output / "report.md").read_text().startswith("# Approximation of matrices")
    assert (output / "errors.png").stat().st_size > 5000
    assert (output / "spectra.png").is_file() == (config == "paper")
    assert main([*arguments, "--output", str(output)]) == 2  # it holds something now


def test_json_on_stdout(capsys):
    arguments = ["--out-features", "12", "--in-features", "8", "--iterations", "2", "--seeds", "1"]
    assert main(["approximate", "--targets", "gaussian", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budgets"] == {"gaussian": 8 * (3 + 4)}
    assert {"mean", "deviation", "budget_ratio"} <= set(found["rows"][0])


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


def test_spectrum_numbers_of_an_orthogonal_matrix():
    measures = spectrum_numbers(decompose(2 * torch.linalg.qr(torch.randn(8, 8))[0], K))
    assert measures["effective_rank"] == pytest.approx(8, rel=1e-5)
    assert measures["nuclear_norm"] == pytest.approx(16, rel=1e-5)
