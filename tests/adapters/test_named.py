import copy

import pytest
import torch
from torch import nn

import vlkr
from vlkr.adapters import set_adapter


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))


def randomise(model):
    for p in vlkr.adapter_parameters(model):
        nn.init.normal_(p)


def test_several_adapters_are_switched_without_touching_the_base(model):
    x = torch.randn(3, 8)
    base, before = model(x).detach(), copy.deepcopy(model.state_dict())
    outputs = {}
    for name, method in {"a": "kradapter", "b": "lora", "c": "bitfit"}.items():
        vlkr.add_adapters(model, method, targets=["*"], adapter_name=name)
        randomise(model)
        outputs[name] = model(x).detach()
    for name in ("a", "c", "b", "a"):
        set_adapter(model, name)
        torch.testing.assert_close(model(x), outputs[name])
        own = {id(p) for _, m in model.named_modules() for p in m.parameters(recurse=False)}
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in vlkr.adapter_parameters(model)}
        assert {id(p) for p in trained} < own
    set_adapter(model)
    torch.testing.assert_close(model(x), base)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_adapters_at_work_together_add_up(model):
    x = torch.randn(3, 8)
    first = model[0]
    deltas = []
    for name in ("a", "b"):
        vlkr.add_adapters(model, "kradapter", targets=["0"], adapter_name=name)
        randomise(model)
        deltas.append(first.adapters[name]["weight"].delta().detach())
    set_adapter(model, "a", "b")
    vlkr.set_adapter_scale(model, 0.5, "b")
    weight = first.weight + deltas[0] + 0.5 * deltas[1]
    expected = model[1](nn.functional.linear(x, weight, first.bias))
    torch.testing.assert_close(model(x), expected)
    vlkr.merge_and_unload(model)
    torch.testing.assert_close(model(x), expected)


def test_one_of_several_is_removed(model):
    x = torch.randn(3, 8)
    base = model(x).detach()
    for name in ("a", "b"):
        vlkr.add_adapters(model, "lora", targets=["0"], adapter_name=name)
        randomise(model)
    vlkr.remove_adapters(model, "b")
    torch.testing.assert_close(model(x), base)
    set_adapter(model, "a")
    assert not torch.allclose(model(x), base)
    vlkr.remove_adapters(model, "a")
    assert type(model[0]) is nn.Linear
    with pytest.raises(vlkr.VlkrError, match="no adapters named 'a'"):
        set_adapter(model, "a")
