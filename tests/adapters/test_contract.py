"""What every adapter keeps on every host."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vlkr.adapters import (
    ADAPTERS,
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    load_adapter,
    merge_and_unload,
    merged,
    remove_adapters,
    save_adapter,
    set_adapter,
)
from vlkr.adapters.inject import injected_adapters

SHAPES = [(8, 8), (12, 6), (6, 12)]


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_adapters_sit_on_the_slots_written_by_hand(host, method, adapt_host):
    model, base = adapt_host()
    suffix = "bias" if ADAPTERS[method].adapts_bias else "weight"
    placed = {
        (f"{p.module}.{p.slot.parameter}", *(p.slot.rows or (0, p.adapter.out_features)))
        for p in injected_adapters(model)
    }
    expected = {(f"{name.removesuffix('weight')}{suffix}", *rows) for name, *rows in host.slots}
    assert placed == expected
    for p in injected_adapters(model):
        weight = p.slot.select(base.get_parameter(f"{p.module}.{p.slot.parameter}"))
        assert p.adapter.delta(weight).shape == weight.shape


def test_model_is_unchanged_at_the_start(host, adapt_host):
    model, base = adapt_host(trained=False)
    x = host.inputs()
    torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    assert len(adapter_parameters(model)) > 0


def test_trained_adapters_change_the_output(host, adapt_host):
    model, base = adapt_host()
    x = host.inputs()
    assert distance(model(x), base(x)) > 1e-3


def test_only_the_adapters_receive_gradients(host, adapt_host):
    model, _ = adapt_host()
    model(host.inputs()).square().sum().backward()
    trainable = {id(p) for p in adapter_parameters(model)}
    for name, p in model.named_parameters():
        assert p.requires_grad == (id(p) in trainable), name
        assert (p.grad is not None) == (id(p) in trainable), name
    for p in adapter_parameters(model):
        assert p.grad.isfinite().all()
        assert p.dtype == p.grad.dtype == torch.float32
    assert all(
        any(p.grad.abs().max() > 0 for p in placed.adapter.parameters())
        for placed in injected_adapters(model)
        if placed.name != "k" or not placed.adapter.adapts_bias  # softmax ignores a bias of k
    )


def test_gradients_equal_those_of_dense_autograd(host, adapt_host, dense_weights):
    model, base = adapt_host(dtype=torch.float64)
    factors = adapter_parameters(model)
    x = host.inputs(dtype=torch.float64, requires_grad=True)
    y, dense_y = model(x), functional_call(base, dense_weights(model, base), x)
    torch.testing.assert_close(y, dense_y, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *factors], direction)
    expected = torch.autograd.grad(dense_y, [x, *factors], direction)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_gradients_pass_gradcheck(in_features, out_features, method, adapt):
    model, _, _ = adapt(nn.Sequential(nn.Linear(in_features, out_features)), method, targets=["0"])
    model.double()
    x = torch.randn(2, 2, in_features, dtype=torch.float64, requires_grad=True)
    # DoRA takes its norm as constant (section 4.3), so finite differences in its factors differ.
    factors = [] if method == "dora" else adapter_parameters(model)
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *factors))


def test_merged_model_equals_the_adapted_one(host, adapt_host, plain):
    model, base = adapt_host()
    x = host.inputs()
    by_hand = plain(model, base)
    adapted = model(x).detach()
    merge_and_unload(model)
    assert relative_error(model(x), adapted) < 1e-5
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    assert relative_error(by_hand(x), adapted) < 1e-5


def test_evaluation_without_gradients_equals_the_adapted_forward(host, adapt_host):
    model, _ = adapt_host()
    x = host.inputs()
    adapted = model(x).detach()
    model.eval()
    with torch.no_grad():
        assert relative_error(model(x), adapted) < 1e-5
    with torch.inference_mode():
        assert relative_error(model(x), adapted) < 1e-5


@pytest.mark.parametrize("take_off", [merge_and_unload, remove_adapters])
def test_taking_off_gives_back_classes_keys_and_attributes(take_off, host, adapt_host):
    model, base = adapt_host()
    take_off(model)
    assert list(model.state_dict()) == list(base.state_dict())
    for (path, module), (_, before) in zip(
        model.named_modules(), base.named_modules(), strict=True
    ):
        assert type(module) is type(before), path
        assert module.__dict__.keys() == before.__dict__.keys(), path
        assert module._parameters.keys() == before._parameters.keys(), path


def test_removing_gives_back_the_base_bit_for_bit(host, adapt_host):
    model, base = adapt_host()
    x = host.inputs()
    model(x).sum().backward()
    remove_adapters(model)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    base.requires_grad_(False)  # torch chooses the kernel of attention by it
    assert torch.equal(model(x), base(x))


def test_base_state_dict_is_untouched_while_adapted(host, adapt_host):
    model, base = adapt_host()
    own = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    assert list(own) == list(base.state_dict())
    assert all(torch.equal(own[name], tensor) for name, tensor in base.state_dict().items())


def test_saved_and_loaded_adapters_compute_the_same(host, adapt_host, tmp_path):
    model, base = adapt_host()
    x = host.inputs()
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(1)
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(x), model(x))
    assert list(adapter_state_dict(base)) == list(adapter_state_dict(model))


def test_parameter_count_equals_num_parameters(host, method, options, adapt_host):
    model, base = adapt_host()
    cls = ADAPTERS[method]
    expected = sum(
        cls.num_parameters(base.get_parameter(name).shape[1], last - first, **options)
        for name, first, last in host.slots
    )
    assert sum(p.numel() for p in adapter_parameters(model)) == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_a_copied_model_is_independent(host, adapt_host):
    model, _ = adapt_host()
    x = host.inputs()
    before = model(x).detach()
    copy = deepcopy(model)
    assert torch.equal(copy(x), before)
    for p in adapter_parameters(copy):
        p.data.zero_()
    assert torch.equal(model(x), before)


def test_gradient_checkpointing_gives_the_same_gradients(host, adapt_host):
    model, _ = adapt_host()
    x = host.inputs(requires_grad=True)
    wanted = [x, *adapter_parameters(model)]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    y = checkpoint(model, x, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_bf16_autocast_trains_with_gradients_near_those_of_fp32(host, adapt_host):
    model, _ = adapt_host()
    x = host.inputs(requires_grad=True)
    direction = torch.randn_like(model(x))
    wanted = [x, *adapter_parameters(model)]
    expected = torch.autograd.grad(model(x), wanted, direction)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, wanted, direction.bfloat16())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.isfinite().all()
        assert (one - other).norm() < 0.05 * other.norm() + 0.02


def test_evaluation_under_autocast_equals_the_merged_model(host, adapt_host):
    model, _ = adapt_host()
    x = host.inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        adapted = model(x).float()
    merge_and_unload(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert distance(adapted, model(x).float()) < 0.02


def test_merging_under_autocast_still_sums_in_fp32(method, adapt, plain):
    model, base, _ = adapt(nn.Sequential(nn.Linear(8, 8)), method, targets=["0"])
    by_hand = plain(model, base)
    with torch.autocast("cpu", torch.bfloat16):
        merge_and_unload(model)
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def train_over_bf16(host, method, adapt):
    model, base, _ = adapt(host.build().bfloat16(), method, targets=host.targets)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model))
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    x = host.inputs(dtype=torch.bfloat16)
    for _ in range(200):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    own = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    assert all(torch.equal(own[name], tensor) for name, tensor in base.state_dict().items())
    remove_adapters(model)
    base.requires_grad_(False)
    assert torch.equal(model(x), base(x))


def test_training_never_writes_to_a_bf16_base(method, adapt, hosts):
    train_over_bf16(hosts["linear-wide"], method, adapt)


@pytest.mark.parametrize("name", ["mha-split", "mha-fused", "open-clip-split", "timm-split"])
def test_training_never_writes_to_a_bf16_attention(name, adapt, hosts):
    train_over_bf16(hosts[name], "kradapter", adapt)


def test_merging_into_bf16_rounds_once(method, adapt, dense_weights):
    model, base, _ = adapt(nn.Sequential(nn.Linear(8, 8)).bfloat16(), method, targets=["0"])
    expected = dense_weights(model, deepcopy(base).float())
    merge_and_unload(model)
    for name, weight in expected.items():
        merged_weight = model.get_parameter(name)
        assert merged_weight.dtype == torch.bfloat16
        assert torch.equal(merged_weight, weight.bfloat16())


def test_merging_two_adapters_into_bf16_rounds_once(adapt, disturb):
    model, base, _ = adapt(nn.Sequential(nn.Linear(64, 64)).bfloat16(), "kradapter", targets=["0"])
    add_adapters(model, "lora", targets=["0"], adapter_name="second")
    set_adapter(model, "default", "second")
    disturb(model)
    deltas = [injected_adapters(model, name)[0].adapter.delta() for name in ("default", "second")]
    merge_and_unload(model)
    assert torch.equal(model[0].weight, (base[0].weight.float() + sum(deltas)).bfloat16())


def assert_compiles(in_features, out_features, method, adapt):
    model, _, _ = adapt(nn.Sequential(nn.Linear(in_features, out_features)), method, targets=["0"])
    x = torch.randn(4, in_features, requires_grad=True)
    wanted = [x, *adapter_parameters(model)]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        found = torch.autograd.grad(y.square().sum(), wanted)
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_linear_gives_the_same_outputs_and_gradients(method, adapt):
    assert_compiles(12, 6, method, adapt)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_compiled_kradapter_of_every_shape(in_features, out_features, adapt):
    assert_compiles(in_features, out_features, "kradapter", adapt)


def test_merged_block_computes_as_the_adapted_model(host, adapt_host):
    model, base = adapt_host()
    x = host.inputs()
    adapted = model(x).detach()
    with merged(model):
        assert relative_error(model(x), adapted) < 1e-5
    assert torch.equal(model(x), adapted)
    remove_adapters(model)
    base.requires_grad_(False)
    assert torch.equal(model(x), base(x))
