import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from helpers import small_run
from safetensors.numpy import load_file

from vlkr.adapters import add_adapters
from vlkr.analysis import spectrum as module
from vlkr.analysis.spectrum import (
    Layer,
    RunSpectra,
    accuracy_drop,
    correlations,
    layer_measures,
    model_spectra,
    spearman,
    spectrum,
)
from vlkr.cli import main
from vlkr.config import AdapterConfig
from vlkr.errors import VlkrError
from vlkr.evaluation.interpolation import interpolate
from vlkr.evaluation.metrics import DatasetResult
from vlkr.evaluation.report import Evaluation
from vlkr.models.clip import load_clip


@pytest.fixture(scope="module")
def lora(tmp_path_factory, small, colors):
    """A run of LoRA at about the budget of the other run's KRAdapter."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    small_run(output, small, colors, adapter=AdapterConfig("lora", match="kradapter"))
    return output


def base_weights(small):
    return load_file(f"{small.removeprefix('local-dir:')}/open_clip_model.safetensors")


def test_layers_are_those_of_the_files_on_disk(run, small):
    base = base_weights(small)
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    (found,) = spectrum([run], device="cpu").runs
    layers = {layer.name: layer for layer in found.layers}
    # q, k, v, out, fc1, fc2 in two visual blocks and a text one
    assert len(layers) == 18
    assert len(factors) == 36
    prefix = "visual.transformer.resblocks.1"
    cases = {
        f"{prefix}.attn.k": (base[f"{prefix}.attn.in_proj_weight"][32:64], f"{prefix}.attn.k"),
        f"{prefix}.mlp.c_fc": (base[f"{prefix}.mlp.c_fc.weight"], f"{prefix}.mlp.c_fc.weight"),
    }
    for name, (weight, key) in cases.items():
        layer = layers[name]
        u, v = (factors[f"base_model.model.{key}.{factor}"][0] for factor in ("u", "v"))
        rows = [np.kron(v[i], u[i])[: max(weight.shape)] for i in range(len(u))]
        delta = 2 * np.stack(rows)  # the adapter's scale
        delta = delta if weight.shape[0] <= weight.shape[1] else delta.T
        sigma = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
        base_sigma = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(layer.sigma, sigma, rtol=1e-3, atol=1e-6 * sigma[0])
        np.testing.assert_allclose(layer.base_sigma, base_sigma, rtol=1e-3)
        p = sigma[sigma > 0] / sigma.sum()
        measures = layer.measures
        assert measures["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), 1e-3)
        assert measures["stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, 1e-3)
        assert measures["nuclear_norm"] == pytest.approx(sigma.sum(), 1e-3)
        assert measures["spectral_norm"] == pytest.approx(sigma[0], 1e-3)
        ratio = np.linalg.norm(delta) / np.linalg.norm(weight)
        assert measures["ratio"] == pytest.approx(ratio, 1e-3)
        assert (layer.tower, layer.block) == ("visual", 1)
    assert layers[f"{prefix}.attn.k"].projection == "k"
    assert layers[f"{prefix}.mlp.c_fc"].projection == "fc1"
    assert layers["transformer.resblocks.0.attn.out"].tower == "text"


def test_overlap_is_one_in_the_bases_own_subspace_and_zero_across():
    u, v = (torch.linalg.qr(torch.randn(n, 16)).Q for n in (24, 16))
    sigma = torch.linspace(2, 1, 16)
    weight = u * sigma @ v.T
    inside = u[:, :4] @ torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0])) @ v[:, :4].T
    across = u[:, 8:12] @ v[:, 8:12].T
    assert layer_measures(inside, weight)[0]["overlap"] == pytest.approx(1, abs=1e-4)
    assert layer_measures(across, weight)[0]["overlap"] == pytest.approx(0, abs=1e-4)
    assert layer_measures(across, weight)[0]["chance_overlap"] == (4 / 24 + 4 / 16) / 2


def test_random_changes_overlap_by_chance():
    found = [layer_measures(torch.randn(40, 24), torch.randn(40, 24))[0] for _ in range(60)]
    chance = found[0]["chance_overlap"]
    assert np.mean([m["overlap"] for m in found]) == pytest.approx(chance, rel=0.1)


@pytest.mark.parametrize("zero", ["change", "weight", "both"])
def test_zeros_give_no_nan(zero):
    change, weight = torch.randn(8, 6), torch.randn(8, 6)
    change = torch.zeros(8, 6) if zero != "weight" else change
    weight = torch.zeros(8, 6) if zero != "change" else weight
    measures, sigma, base_sigma = layer_measures(change, weight)
    assert all(math.isfinite(value) for value in measures.values())
    assert measures["overlap"] == 0
    assert sigma.shape == base_sigma.shape == (6,)


def test_an_untrained_model_has_zero_spectra():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    add_adapters(model, "kradapter", targets=["*"])
    layers = model_spectra(model)
    assert [layer.name for layer in layers] == ["0", "1"]
    assert all(layer.measures["effective_rank"] == 0 for layer in layers)
    assert {layer.place for layer in layers} == {"model 0", "model 1"}


def test_methods_side_by_side(run, lora, tmp_path, capsys):
    output = tmp_path / "spectra"
    assert main(["spectrum", "--run", str(run), str(lora), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "kradapter has a higher effective rank than lora in" in shown
    found = json.loads((output / "spectrum.json").read_text())
    assert [r["method"] for r in found["runs"]] == ["kradapter", "lora"]
    ranks = [
        {x["name"]: x["measures"]["effective_rank"] for x in r["layers"]} for r in found["runs"]
    ]
    above = sum(ranks[0][name] > ranks[1][name] for name in ranks[0])
    assert found["effective_rank_by_layer"] == [
        {"methods": ["kradapter", "lora"], "layers": 18, "first_above": above}
    ]
    assert all(len(layer["sigma"]) > 0 for r in found["runs"] for layer in r["layers"])
    for picture in ("heatmap.png", "curves.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    report = (output / "report.md").read_text()
    assert "| mean over layers | kradapter | lora | base weights |" in report
    assert "| layers | 18 | 18 |" in report
    assert "nan" not in report.lower()
    assert main(["spectrum", "--run", str(run), "--output", str(output)]) == 2


def test_json_on_stdout_is_without_singular_values(run, capsys):
    assert main(["spectrum", "--run", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "sigma" not in found["runs"][0]["layers"][0]
    assert found["effective_rank_by_layer"] == []


def test_runs_of_one_adapter_with_other_options_are_told_apart(lora, small, colors, tmp_path):
    other = tmp_path / "lora2"
    small_run(other, small, colors, adapter=AdapterConfig("lora", options={"rank": 2}))
    methods = spectrum([lora, other], device="cpu").methods
    assert methods[1] == "lora rank=2"
    assert methods[0].startswith("lora rank=")


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties):
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.normal(size=(2, 8))
        if ties:
            a, b = a.round(), b.round()
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None


def made_run(value, drop):
    measures = {"effective_rank": value, "ratio": 1.0, "base_effective_rank": 3.0}
    measures["chance_overlap"] = 0.1
    layer = Layer("0", "model", 0, "q", (2, 2), measures, [1.0], [1.0])
    return RunSpectra("x", "lora", [layer], drop)


def test_correlations_over_runs_with_an_accuracy_drop():
    runs = [made_run(1.0, 0.3), made_run(2.0, 0.2), made_run(3.0, 0.1), made_run(9.0, None)]
    assert correlations(runs) == {"effective_rank": -1.0}
    assert correlations(runs[:2]) == {}


def test_the_accuracy_drop_is_in_distribution_less_the_mean_of_shifts(monkeypatch, run):
    def evaluation(**_):
        names = ("home", "a", "b")
        accuracies = (0.9, 0.5, 0.6)
        return Evaluation(
            [
                DatasetResult(n, "test", 10, "t", {"acc1": a})
                for n, a in zip(names, accuracies, strict=True)
            ]
        )

    monkeypatch.setattr(module, "evaluate", evaluation)
    assert accuracy_drop(run) == pytest.approx(0.35)
    found = spectrum([run, run, run], device="cpu")
    assert [r.accuracy_drop for r in found.runs] == pytest.approx([0.35] * 3)
    assert found.correlations == {}  # all runs are the same
    assert all(
        r.accuracy_drop is None for r in spectrum([run, run, run], include_shifts=False).runs
    )


def test_a_dataset_without_shifts_has_no_drop(run):
    assert accuracy_drop(run, "cpu") is None


def test_wrong_runs_are_named(run, tmp_path, small, colors):
    with pytest.raises(VlkrError, match="no run is given"):
        spectrum([])
    with pytest.raises(VlkrError, match="no run folder"):
        spectrum([tmp_path / "none"])
    bias = tmp_path / "bias"
    small_run(bias, small, colors, adapter=AdapterConfig("bitfit"))
    assert yaml.safe_load((bias / "config.yaml").read_text())["adapter"]["name"] == "bitfit"
    with pytest.raises(VlkrError, match="changed no weight: 'bitfit'"):
        spectrum([bias])


def test_a_scaled_adapter_has_a_scaled_spectrum(run, tmp_path):
    interpolate(run, include_shifts=False, alphas=[0.25], save="0.25", output=tmp_path / "quarter")
    whole, quarter = spectrum([run, tmp_path / "quarter"], include_shifts=False).runs
    assert [whole.method, quarter.method] == ["kradapter scale=1.0", "kradapter scale=0.25"]
    for name in ("frobenius_norm", "ratio"):
        assert quarter.mean(name) == pytest.approx(0.25 * whole.mean(name), rel=1e-4)
    assert quarter.mean("effective_rank") == pytest.approx(whole.mean("effective_rank"), rel=1e-4)


def test_adapters_of_another_name_are_passed_over(small):
    model = load_clip(small).model
    found = add_adapters(model, "lora", targets=["q"])
    add_adapters(model, "lora", targets=["fc1"], adapter_name="other")
    assert [layer.name for layer in model_spectra(model)] == [target.path for target in found]
