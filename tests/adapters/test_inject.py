"""Adding, activating, scaling, merging and removing adapters."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near
from torch import nn

import vlkr
from vlkr.adapters import (
    Adapter,
    ComposedWeightCache,
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
from vlkr.adapters.hosts import adapter_layers, weights_hash
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


@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_scale_multiplies_every_update(scale, host, adapt_host, dense_weights):
    model, base = adapt_host()
    x = host.inputs()
    dense = dense_weights(model, base)
    by_hand = deepcopy(base)
    for name, adapted in dense.items():
        weight = by_hand.get_parameter(name)
        weight.data += scale * (adapted - weight).detach()
    set_adapter_scale(model, scale)
    assert_near(model(x), by_hand(x))
    with torch.no_grad():
        assert_near(model(x), by_hand(x))
    with merged(model):
        assert_near(model(x), by_hand(x))
    merge_and_unload(model)
    for name in dense:
        assert_near(model.get_parameter(name), by_hand.get_parameter(name))


def test_scale_zero_is_the_base_bit_for_bit(two_linears, method):
    model, base, _ = two_linears(method)
    set_adapter_scale(model, 0)
    x = torch.randn(5, 12)
    assert torch.equal(model(x), base(x))
    set_adapter_scale(model, 1)
    assert not torch.allclose(model(x), base(x), atol=1e-3)


def test_scale_reaches_the_gradient(two_linears):
    model, base, _ = two_linears()
    set_adapter_scale(model, 0.5)
    x = torch.randn(5, 12)
    grads = torch.autograd.grad(model(x).sum(), adapter_parameters(model))
    adapters = [model[i].adapters["default"]["weight"] for i in (0, 2)]
    hidden = torch.relu(x @ (base[0].weight + 0.5 * adapters[0].delta()).T + base[0].bias)
    y = hidden @ (base[2].weight + 0.5 * adapters[1].delta()).T + base[2].bias
    assert_near(grads, torch.autograd.grad(y.sum(), adapter_parameters(model)), scale=1.0)


class Stop(Exception):
    pass


def test_merged_block_restores_bit_for_bit_also_when_it_raises(two_linears, method, plain):
    model, base, _ = two_linears(method)
    x = torch.randn(5, 12)
    adapted = model(x).detach()
    by_hand = plain(model, base)

    def stop():
        with merged(model):
            assert_near(model(x).detach(), adapted)
            for name, weight in by_hand.named_parameters():
                assert_near(model.get_parameter(name), weight)
            with merged(model):
                assert_near(model(x).detach(), adapted)
            assert_near(model(x).detach(), adapted)
            raise Stop

    with pytest.raises(Stop):
        stop()
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize(
    ("action", "change"),
    [
        ("merge adapters", merge_and_unload),
        ("scale adapters", lambda m: set_adapter_scale(m, 0.5)),
        ("remove adapters", remove_adapters),
        ("activate adapters", lambda m: set_adapter(m, "default")),
        ("add adapters", lambda m: add_adapters(m, "lora", targets=["0"], adapter_name="more")),
    ],
)
def test_nothing_is_changed_while_adapters_are_merged(adapt, action, change):
    model, base, _ = adapt(nn.Sequential(nn.Linear(6, 6)), "kradapter", targets=["0"])
    x = torch.randn(3, 6)
    expected = model(x).detach()
    with merged(model), pytest.raises(VlkrError, match=f"cannot {action} inside merged"):
        change(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.state_dict()["0.weight"], base.state_dict()["0.weight"])


def test_taking_off_what_is_not_there_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    for take_off in (merge_and_unload, remove_adapters, adapter_state_dict):
        with pytest.raises(VlkrError, match="no adapters"):
            take_off(model)


def test_merge_adapters_is_another_name():
    assert vlkr.merge_adapters is vlkr.merge_and_unload


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("kradaptr",), {}, "'kradaptr'.*'kradapter'"),
        (("lora",), {"rnak": 3}, "'rnak'.*rank"),
        (("lora",), {"rank": 0}, "rank 0"),
        (("lora",), {"rank": 2.0}, "option rank of adapter 'lora' is 2.0, expected a value like"),
        (("lora",), {"rank": True}, "option rank .* is True"),
        (("lora",), {"alpha": "5"}, "option alpha .* is '5'"),
        (("lora",), {"alpha": float("nan")}, "option alpha .* is nan"),
        (("lora",), {"use_rslora": 1}, "option use_rslora .* is 1"),
        (("kradapter",), {"rule": "best"}, "'best'"),
        (("lora",), {"targets": ["nothing"]}, "'nothing'"),
        (("lora",), {"towers": ["left"]}, "'left'"),
        (("lora",), {"blocks": [7]}, "block 7"),
        (("lora",), {"adapter_name": "a.b"}, "'a.b'"),
        (("lora",), {"adapter_name": ""}, "''"),
        (("lora",), {"adapter_name": "train"}, "'train'"),
    ],
)
def test_mistakes_are_named_and_leave_the_model_alone(arguments, keywords, message, tiny_clip):
    before = snapshot(tiny_clip)
    with pytest.raises(VlkrError, match=message):
        add_adapters(tiny_clip, *arguments, **keywords)
    assert_untouched(tiny_clip, before)


def test_add_returns_what_it_adapted(tiny_clip):
    targets = add_adapters(tiny_clip, "kradapter", targets=["q", "fc2"], blocks=[-1])
    assert [t.path for t in targets] == [
        "visual.transformer.resblocks.1.attn.q",
        "visual.transformer.resblocks.1.mlp.c_proj",
        "transformer.resblocks.2.attn.q",
        "transformer.resblocks.2.mlp.c_proj",
    ]


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


def test_adapters_are_switched_without_touching_the_base(two_adapters):
    model, base, alone = two_adapters
    before = snapshot(model)
    with pytest.raises(VlkrError, match="'default'"):
        add_adapters(model, "lora", targets=["0"])
    assert_untouched(model, before)
    x = torch.randn(5, 12)
    assert_near(model(x), alone["other"](x))  # the one added last
    for name in ("default", "other", "default"):
        set_adapter(model, name)
        assert_near(model(x), alone[name](x))
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trained == {k for k, _ in model.named_parameters() if f".adapters.{name}." in k}
        assert len(trained) == len(adapter_parameters(model))
    set_adapter(model)
    assert torch.equal(model(x), base(x))
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.state_dict().items())
    with pytest.raises(VlkrError, match="no adapters named 'third'"):
        set_adapter(model, "third")


def test_each_active_adapter_has_a_scale_of_its_own(two_adapters):
    model, base, _ = two_adapters
    first, other = (model[0].adapters[n]["weight"].delta() for n in ("default", "other"))
    last = model[2].adapters["default"]["weight"].delta()
    set_adapter(model, "default", "other")
    x = torch.randn(5, 12)
    for scale in (0.5, 0.0):
        set_adapter_scale(model, scale, "default")
        weight = base[0].weight + scale * first + other
        hidden = F.linear(x, weight, base[0].bias).relu()
        expected = F.linear(hidden, base[2].weight + scale * last, base[2].bias)
        assert_near(model(x), expected)
    with pytest.raises(VlkrError, match="'third'"):
        set_adapter_scale(model, 0, adapter_name="third")
    merge_and_unload(model)
    assert_near(model(x), expected)


def test_merging_takes_only_active_adapters(two_adapters):
    model, _, alone = two_adapters
    set_adapter(model, "default")
    merge_and_unload(model)
    x = torch.randn(5, 12)
    assert_near(model(x), alone["default"](x))
    assert list(model.state_dict()) == list(alone["default"].state_dict())


def test_removing_one_adapter_leaves_the_other(two_adapters):
    model, base, alone = two_adapters
    set_adapter(model, "default", "other")
    remove_adapters(model, "default")
    x = torch.randn(5, 12)
    assert_near(model(x), alone["other"](x))
    assert type(model[2]) is nn.Linear
    assert [n for n in model.state_dict() if ".adapters." in n] == [
        "0.adapters.other.weight.lora_A",
        "0.adapters.other.weight.lora_B",
    ]
    with pytest.raises(VlkrError, match="'default'"):
        remove_adapters(model, "default")
    add_adapters(model, "bitfit", targets=["0"])
    remove_adapters(model, "default")
    assert torch.equal(model(x), base(x))  # the other one was not activated again
    remove_adapters(model, "other")
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(model(x), base(x))


def test_state_dict_names_and_detaches_the_factors(two_linears):
    model, _, _ = two_linears("lora")
    state = adapter_state_dict(model)
    assert list(state) == [f"{i}.weight.{name}" for i in (0, 2) for name in ("lora_A", "lora_B")]
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_over_the_mode_of_the_model(training, adapt, tmp_path):
    model = nn.Sequential(nn.Linear(12, 8)).train(training)
    model, base, _ = adapt(model, "lora", targets=["0"], dropout=0.5)
    x = torch.randn(64, 12)
    assert torch.equal(model(x), model(x)) != training
    assert {m.training for m in model.modules()} == {training}
    save_adapter(model, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    assert {m.training for m in base.modules()} == {training}


def test_base_hash_does_not_see_adapters(two_linears, method):
    model, base, _ = two_linears(method)
    assert weights_hash(model) == weights_hash(base)
    merge_and_unload(model)
    assert weights_hash(model) != weights_hash(base)


def test_composing_once_gives_the_gradients_of_composing_for_each_batch(method, adapt):
    model = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(8, 2, batch_first=True), "fc": nn.Linear(8, 8)}
    )
    adapt(model, method, targets=["attn.q", "attn.v", "attn.out", "fc"])
    batches = [torch.randn(2, 3, 8) for _ in range(3)]

    def accumulate():
        for x in batches:
            model["fc"](model["attn"](x, x, x)[0]).square().sum().backward()

    def take_gradients():
        grads = [p.grad for p in adapter_parameters(model)]
        model.zero_grad(set_to_none=True)
        return grads

    accumulate()
    expected = take_gradients()
    cache = ComposedWeightCache(model)
    cache.begin()
    calls = []
    for module in model.modules():
        if isinstance(module, Adapter) and not module.has_low_rank_forward:
            delta = module.delta
            module.delta = lambda w=None, delta=delta: calls.append(1) or delta(w)
    accumulate()
    assert not calls  # nothing was composed in between
    cache.finish()
    assert_near(take_gradients(), expected, condition=8)
    assert not any(host.composed_weights for _, host in adapter_layers(model))
