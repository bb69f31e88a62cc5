import json

import peft
import pytest
import torch
from helpers import tolerance
from torch import nn

import vlkr
from vlkr.adapters import load_authors_kradapter


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 6))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"2": 3}}])
def test_a_lora_folder_of_peft_gives_the_same_model(tmp_path, options):
    theirs = peft.get_peft_model(
        plain(), peft.LoraConfig(target_modules=["0", "2"], r=3, lora_alpha=5, **options)
    )
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    theirs.save_pretrained(tmp_path)
    ours = plain()
    vlkr.load_adapter(ours, tmp_path)
    x = torch.randn(4, 9)
    # Both sum in another order: in float64, rounding is far below what a wrong scale would change.
    ours, theirs, x = ours.eval().double(), theirs.eval().double(), x.double()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=tolerance(theirs(x), terms=9))


def test_other_folders_of_peft_are_refused(tmp_path):
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["0"], use_dora=True))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(vlkr.VlkrError, match="peft's DoRA, expected its plain LoRA"):
        vlkr.load_adapter(plain(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(vlkr.VlkrError, match="expected lora_A and lora_B alone"):
        vlkr.load_adapter(plain(), tmp_path)


def test_the_authors_factors_give_the_authors_forward():
    model = plain()
    state = {
        "0.weight": torch.randn(9, 3),
        "0.v_weight": torch.randn(9, 4),
        "2.weight": torch.randn(6, 2),
        "2.v_weight": torch.randn(6, 6),
    }
    x = torch.randn(4, 9)

    def authors(linear, x, weight, v_weight):
        rows = torch.stack([torch.kron(v, u) for u, v in zip(weight, v_weight, strict=True)])
        delta = rows[:, : max(linear.weight.shape)]
        delta = delta.T if linear.out_features > linear.in_features else delta
        return x @ delta.T * 2.0 + linear(x)

    hidden = authors(model[0], x, state["0.weight"], state["0.v_weight"]).relu()
    expected = authors(model[2], hidden, state["2.weight"], state["2.v_weight"]).detach()
    found = load_authors_kradapter(model, state)
    assert [t.module for t in found] == ["0", "2"]
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(vlkr.VlkrError, match=r"holds no \.v_weight"):
        load_authors_kradapter(plain(), {})
    state["2.v_weight"] = torch.randn(6, 5)
    with pytest.raises(vlkr.VlkrError, match="factors of 2 are"):
        load_authors_kradapter(plain(), state)
