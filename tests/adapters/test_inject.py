from copy import deepcopy

import pytest
import torch
from torch import nn

from vlkr.adapters import (
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    load_adapter,
    merge_and_unload,
    merged,
    remove_adapters,
    save_adapter,
    set_adapter,
    set_adapter_scale,
)
from vlkr.adapters.hosts import weights_hash
from vlkr.errors import VlkrError


@pytest.fixture
def two_linears(adapt):
    def make(method="kradapter", **options):
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
        return adapt(model, method, targets=["*"], **options)

    return make


def snapshot(model):
    return (
        [type(m) for m in model.modules()],
        {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()},
    )


def assert_untouched(model, before):
    types, parameters = snapshot(model)
    assert types == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (tensor, requires_grad) in parameters.items():
        assert torch.equal(tensor, before[1][name][0]), name
        assert requires_grad == before[1][name][1], name


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, -2.0])
def test_scale_multiplies_every_change(scale, host, adapt_host, dense_weights):
    model, base = adapt_host()
    x = host.inputs()
    dense = dense_weights(model, base)
    by_hand = deepcopy(base)
    for name, adapted in dense.items():
        weight = by_hand.get_parameter(name)
        weight.data += scale * (adapted - weight).detach()
    set_adapter_scale(model, scale)
    torch.testing.assert_close(model(x), by_hand(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(x), rtol=1e-4, atol=1e-5)
    merge_and_unload(model)
    for name in dense:
        torch.testing.assert_close(model.get_parameter(name), by_hand.get_parameter(name))


def test_scale_zero_is_the_base_bit_for_bit(two_linears, method):
    model, base, _ = two_linears(method)
    set_adapter_scale(model, 0)
    x = torch.randn(5, 12)
    assert torch.equal(model(x), base(x))
    set_adapter_scale(model, 1)
    assert not torch.equal(model(x), base(x))


def test_scale_reaches_the_gradient(two_linears):
    model, base, _ = two_linears()
    set_adapter_scale(model, 0.5)
    x = torch.randn(5, 12)
    found = torch.autograd.grad(model(x).sum(), adapter_parameters(model))
    adapters = [model[i].adapters["default"]["weight"] for i in (0, 2)]
    hidden = torch.relu(x @ (base[0].weight + 0.5 * adapters[0].delta()).T + base[0].bias)
    y = hidden @ (base[2].weight + 0.5 * adapters[1].delta()).T + base[2].bias
    expected = torch.autograd.grad(y.sum(), adapter_parameters(model))
    torch.testing.assert_close(found, expected)


def test_scale_belongs_to_its_adapter(two_linears, disturb):
    model, base, _ = two_linears()
    add_adapters(model, "lora", targets=["0"], adapter_name="other")
    set_adapter(model, "default", "other")
    disturb(model)
    x = torch.randn(5, 12)
    set_adapter_scale(model, 0, adapter_name="default")
    other = model[0].adapters["other"]["weight"].delta()
    hidden = torch.relu(x @ (base[0].weight + other).T + base[0].bias)
    torch.testing.assert_close(model(x), hidden @ base[2].weight.T + base[2].bias)
    with pytest.raises(VlkrError, match="'third'"):
        set_adapter_scale(model, 0, adapter_name="third")


class Stop(Exception):
    pass


def test_merged_block_restores_bit_for_bit_also_when_it_raises(two_linears, method):
    model, base, _ = two_linears(method)
    x = torch.randn(5, 12)
    adapted = model(x).detach()

    def stop():
        with merged(model):
            torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
            raise Stop

    with pytest.raises(Stop):
        stop()
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert torch.equal(model(x), adapted)


def test_merged_weights_are_in_place_within_the_block(two_linears, plain):
    model, base, _ = two_linears()
    by_hand = plain(model, base)
    with merged(model):
        for name, weight in by_hand.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), weight)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.named_parameters())


def test_merged_blocks_nest(two_linears):
    model, _, _ = two_linears()
    x = torch.randn(5, 12)
    adapted = model(x).detach()
    with merged(model):
        with merged(model):
            torch.testing.assert_close(model(x), adapted)
        torch.testing.assert_close(model(x), adapted)
    assert torch.equal(model(x), adapted)


def test_merged_with_a_scale_of_one_half(two_linears):
    model, _, _ = two_linears()
    set_adapter_scale(model, 0.5)
    x = torch.randn(5, 12)
    adapted = model(x).detach()
    with merged(model):
        torch.testing.assert_close(model(x), adapted)
    assert torch.equal(model(x), adapted)


def test_taking_off_what_is_not_there_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    for take_off in (merge_and_unload, remove_adapters, adapter_state_dict):
        with pytest.raises(VlkrError, match="no adapters"):
            take_off(model)


def test_a_name_in_use_is_refused_and_another_is_not(two_linears):
    model, _, _ = two_linears()
    before = snapshot(model)
    with pytest.raises(VlkrError, match="'default'"):
        add_adapters(model, "lora", targets=["0"])
    assert_untouched(model, before)
    add_adapters(model, "lora", targets=["0"], adapter_name="second")
    assert all(p.requires_grad for p in adapter_parameters(model))


@pytest.mark.parametrize(
    ("arguments", "keywords", "named"),
    [
        (("kradaptr",), {}, "'kradaptr'.*'kradapter'"),
        (("lora",), {"rnak": 3}, "'rnak'.*rank"),
        (("lora",), {"rank": 0}, "rank 0"),
        (("kradapter",), {"rule": "best"}, "'best'"),
        (("lora",), {"targets": ["nothing"]}, "'nothing'"),
        (("lora",), {"towers": ["left"]}, "'left'"),
        (("lora",), {"blocks": [7]}, "block 7"),
        (("lora",), {"adapter_name": "a.b"}, "'a.b'"),
        (("lora",), {"adapter_name": ""}, "''"),
        (("lora",), {"adapter_name": "train"}, "'train'"),
    ],
)
def test_mistakes_are_named_and_leave_the_model_alone(arguments, keywords, named, tiny_clip):
    before = snapshot(tiny_clip)
    with pytest.raises(VlkrError, match=named):
        add_adapters(tiny_clip, *arguments, **keywords)
    assert_untouched(tiny_clip, before)


def test_add_returns_what_it_adapted(tiny_clip):
    found = add_adapters(tiny_clip, "kradapter", targets=["q", "fc2"], blocks=[-1])
    assert {t.path for t in found} == {
        "visual.transformer.resblocks.1.attn.q",
        "visual.transformer.resblocks.1.mlp.c_proj",
        "transformer.resblocks.2.attn.q",
        "transformer.resblocks.2.mlp.c_proj",
    }
    assert len(found) == 4


@pytest.fixture
def two_adapters(two_linears, disturb, plain):
    """A model with two named adapters, its base, and each adapter's plain equivalent."""
    model, base, _ = two_linears()
    alone = {"default": plain(model, base)}
    add_adapters(model, "lora", targets=["0"], adapter_name="other", rank=2)
    disturb(model)
    alone["other"] = deepcopy(base)
    alone["other"][0].weight.data += model[0].adapters["other"]["weight"].delta().detach()
    return model, base, alone


def test_the_last_added_adapter_is_alone_at_work(two_adapters):
    model, _, alone = two_adapters
    x = torch.randn(5, 12)
    torch.testing.assert_close(model(x), alone["other"](x))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["0.adapters.other.weight.lora_A", "0.adapters.other.weight.lora_B"]
    assert len(adapter_parameters(model)) == 2


def test_merging_takes_only_the_adapters_at_work(two_adapters):
    model, _, alone = two_adapters
    set_adapter(model, "default")
    merge_and_unload(model)
    x = torch.randn(5, 12)
    torch.testing.assert_close(model(x), alone["default"](x))
    assert list(model.state_dict()) == list(alone["default"].state_dict())


def test_removing_one_adapter_leaves_the_other(two_adapters, tmp_path):
    model, base, alone = two_adapters
    set_adapter(model, "default", "other")
    remove_adapters(model, "default")
    x = torch.randn(5, 12)
    torch.testing.assert_close(model(x), alone["other"](x))
    assert type(model[2]) is nn.Linear
    assert [n for n in model.state_dict() if ".adapters." in n] == [
        "0.adapters.other.weight.lora_A",
        "0.adapters.other.weight.lora_B",
    ]
    with pytest.raises(VlkrError, match="'default'"):
        remove_adapters(model, "default")
    add_adapters(model, "bitfit", targets=["0"])
    remove_adapters(model, "default")
    remove_adapters(model, "other")
    assert list(model.state_dict()) == list(base.state_dict())
    base.requires_grad_(False)
    assert torch.equal(model(x), base(x))


def test_state_dict_names_and_detaches_the_factors(two_linears):
    model, _, _ = two_linears("lora")
    state = adapter_state_dict(model)
    assert list(state) == [f"{i}.weight.{name}" for i in (0, 2) for name in ("lora_A", "lora_B")]
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_over_the_mode_of_the_model(training, adapt):
    model = nn.Sequential(nn.Linear(12, 8)).train(training)
    model, _, _ = adapt(model, "lora", targets=["0"], dropout=0.5)
    x = torch.randn(64, 12)
    assert torch.equal(model(x), model(x)) != training
    assert {m.training for m in model.modules()} == {training}


def test_loaded_dropout_is_off_in_a_model_that_evaluates(adapt, tmp_path):
    model, base, _ = adapt(nn.Sequential(nn.Linear(12, 8)), "lora", targets=["0"], dropout=0.5)
    save_adapter(model, tmp_path / "adapter")
    base.eval()
    load_adapter(base, tmp_path / "adapter")
    x = torch.randn(64, 12)
    torch.testing.assert_close(base(x), model.eval()(x))


def test_base_hash_does_not_see_adapters(two_linears, method):
    model, base, _ = two_linears(method)
    assert weights_hash(model) == weights_hash(base)
    merge_and_unload(model)
    assert weights_hash(model) != weights_hash(base)
