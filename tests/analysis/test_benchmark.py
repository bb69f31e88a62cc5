import json
import math

import pytest
import torch
from helpers import write_clip
from rich.console import Console
from safetensors.torch import save_file

from vlkr.approximation.approximate import approximate
from vlkr.approximation.methods import DEFAULT_METHODS
from vlkr.approximation.targets import DEFAULT_TARGETS, target_maker
from vlkr.cli import main
from vlkr.errors import VlkrError

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
    assert pairs == [(t, m) for t in DEFAULT_TARGETS for m in DEFAULT_METHODS]
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
        assert row.trained == table.row("sparse", row.method).trained


def test_figures_are_those_of_the_approximation(table):
    row = table.row("gaussian", "lora")
    target = target_maker("gaussian")(24, 16, torch.Generator().manual_seed(1))
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
    found.show(Console(quiet=True))


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


def test_weights_are_scaled_and_alone(tmp_path):
    clip = write_clip(tmp_path / "clip")
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
