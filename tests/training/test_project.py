import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlkr
from vlkr.config import AdapterConfig
from vlkr.errors import VlkrError
from vlkr.models.clip import load_clip
from vlkr.training.recipe import project_fine_tune


@pytest.fixture
def tuned(small, tmp_path):
    """A copy of the small model with a change of rank 2 in every projection of its blocks."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    source = load_clip(small)
    origin = Path(small.removeprefix("local-dir:"))
    (folder / "open_clip_config.json").write_bytes((origin / "open_clip_config.json").read_bytes())
    state = {key: value.clone() for key, value in source.model.state_dict().items()}
    torch.manual_seed(0)
    for key, value in state.items():
        if key.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")):
            value += 0.01 * torch.randn(value.shape[0], 2) @ torch.randn(2, value.shape[1])
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def test_a_low_rank_fine_tune_is_a_lora(small, tuned, tmp_path):
    options = AdapterConfig("lora", targets=["qkv", "out", "fc1", "fc2"], options={"rank": 2})
    result = project_fine_tune(tmp_path / "adapter", small, tuned, adapter=options)
    assert result.error < 1e-3
    json.dumps(result.to_json())
    bundle = load_clip(small)
    vlkr.load_adapter(bundle.model, tmp_path / "adapter")
    vlkr.merge_and_unload(bundle.model)
    plain = open_clip.create_model(tuned)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(bundle.model.state_dict()[key], value, atol=1e-5, rtol=1e-4)


def test_more_terms_miss_less(small, tuned, tmp_path):
    errors = [
        project_fine_tune(
            tmp_path / str(terms),
            small,
            tuned,
            adapter=AdapterConfig("kradapter", options={"num_terms": terms}),
        ).error
        for terms in (1, 2, 4)
    ]
    assert 1 > errors[0] > errors[1] > errors[2]
    stored = load_file(tmp_path / "2" / "adapter_model.safetensors")
    assert all(value.shape[0] == 2 for value in stored.values())


def test_a_budget_is_refused(small, tmp_path):
    with pytest.raises(VlkrError, match=r"adapter\.match cannot be used with project"):
        project_fine_tune(tmp_path / "out", small, small, adapter=AdapterConfig(match="lora"))
