"""The rules that every adapter keeps on every host."""

import warnings
from copy import deepcopy

import pytest
import torch
from helpers import assert_near
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vlkr.adapters import (
    ADAPTERS,
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    count_parameters,
    load_adapter,
    merge_and_unload,
    merged,
    remove_adapters,
    save_adapter,
    set_adapter,
)
from vlkr.adapters.base import option_defaults
from vlkr.adapters.inject import injected_adapters


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_adapters_sit_on_the_slots_written_by_hand(host, method, options, adapt_host):
    model, base = adapt_host()
    cls = ADAPTERS[method]
    suffix = "bias" if cls.adapts_bias else "weight"
    slots = {
        (f"{a.module}.{a.slot.parameter}", *(a.slot.rows or (0, a.adapter.out_features)))
        for a in injected_adapters(model)
    }
    assert slots == {
        (f"{name.removesuffix('weight')}{suffix}", *rows) for name, *rows in host.slots
    }
    count = sum(
        cls.num_parameters(base.get_parameter(name).shape[1], last - first, **options)
        for name, first, last in host.slots
    )
    assert sum(p.numel() for p in adapter_parameters(model)) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert count_parameters(method, base, targets=host.targets, **options) == count


def test_a_method_keeps_the_rules_of_the_contract(method, options):
    adapter = ADAPTERS[method](12, 6, **options)
    weight = torch.randn(adapter.shape)
    adapter.init_from_weight(weight)
    assert_near(weight + adapter.delta(weight), weight)
    assert set(adapter.state_dict()) == set(adapter._parameters) - {"w"}  # without a third factor
    assert all(type(v) in (bool, int, float, str, type(None)) for v in adapter.options().values())
    assert adapter.options().keys() == option_defaults(ADAPTERS[method]).keys()
    twin = ADAPTERS[method](12, 6, **adapter.options())
    for p in adapter.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    twin.load_state_dict(adapter.state_dict())
    before = {key: id(value) for key, value in vars(adapter).items()}
    assert torch.equal(adapter.delta(weight), adapter.delta(weight))
    assert torch.equal(twin.delta(weight), adapter.delta(weight))
    assert {key: id(value) for key, value in vars(adapter).items()} == before
    if adapter.needs_weight:
        assert not torch.allclose(adapter.delta(weight), adapter.delta(2 * weight), atol=1e-3)
    else:
        assert torch.equal(adapter.delta(), adapter.delta(weight))


def test_model_is_unchanged_at_the_start(host, adapt_host):
    model, base = adapt_host(trained=False)
    x = host.inputs()
    assert_near(model(x), base(x))
    assert len(adapter_parameters(model)) > 0


def test_only_the_adapters_receive_gradients(host, adapt_host):
    model, base = adapt_host()
    x = host.inputs()
    y = model(x)
    assert distance(y, base(x)) > 1e-3
    y.square().sum().backward()
    trainable = {id(p) for p in adapter_parameters(model)}
    for name, p in model.named_parameters():
        assert p.requires_grad == (id(p) in trainable), name
        assert (p.grad is not None) == (id(p) in trainable), name
    for p in adapter_parameters(model):
        assert p.grad.isfinite().all()
        assert p.dtype == p.grad.dtype == torch.float32
    assert all(
        any(p.grad.abs().max() > 0 for p in a.adapter.parameters())
        for a in injected_adapters(model)
        if not (a.name.startswith("k") and a.adapter.adapts_bias)  # softmax ignores a bias of k
    )


def test_gradients_equal_those_of_dense_autograd(host, adapt_host, dense_weights):
    model, base = adapt_host(dtype=torch.float64)
    factors = adapter_parameters(model)
    x = host.inputs(dtype=torch.float64, requires_grad=True)
    y, dense_y = model(x), functional_call(base, dense_weights(model, base), x)
    assert_near(y, dense_y, condition=8)
    direction = torch.randn_like(y)
    loss = (y * direction).sum()
    grads = torch.autograd.grad(loss, [x, *factors], retain_graph=True)
    expected = torch.autograd.grad(dense_y, [x, *factors], direction)
    assert_near(grads, expected, condition=64, scale=1.0)
    again = torch.autograd.grad(loss, [x, *factors])
    assert_near(again, grads, scale=1.0)


def test_gradients_pass_gradcheck(method, adapt):
    model, _, _ = adapt(nn.Sequential(nn.Linear(12, 6)), method, targets=["0"])
    model.double()
    x = torch.randn(2, 2, 12, dtype=torch.float64, requires_grad=True)
    # DoRA treats its norm as constant (section 4.3), so finite differences in its factors differ.
    factors = [] if method == "dora" else adapter_parameters(model)
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *factors))


def test_second_derivatives_are_refused_not_wrong(adapt):
    model, _, _ = adapt(nn.Sequential(nn.Linear(12, 6)), "kradapter", targets=["0"])
    x = torch.randn(3, 12, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_merged_model_equals_the_adapted_one(host, adapt_host, plain):
    model, base = adapt_host()
    x = host.inputs()
    by_hand = plain(model, base)
    adapted = model(x).detach()
    model.eval()
    with torch.no_grad():
        assert_near(model(x), adapted)
    with torch.inference_mode():
        assert_near(model(x), adapted)
    merge_and_unload(model)
    assert_near(model(x).detach(), adapted)
    assert_near(by_hand(x).detach(), adapted)
    for name, weight in by_hand.state_dict().items():
        assert_near(model.state_dict()[name], weight, terms=8)


@pytest.mark.parametrize("take_off", [merge_and_unload, remove_adapters])
def test_taking_off_restores_classes_keys_attributes_and_hooks(take_off, host, adapt_host):
    model, base = adapt_host()
    take_off(model)
    assert list(model.state_dict()) == list(base.state_dict())
    for (path, module), (_, before) in zip(
        model.named_modules(), base.named_modules(), strict=True
    ):
        assert type(module) is type(before), path
        assert module.__dict__.keys() == before.__dict__.keys(), path
        assert module._parameters.keys() == before._parameters.keys(), path
        hooks = [key for key in module.__dict__ if key.endswith("_hooks")]
        assert hooks
        assert not any(module.__dict__[key] for key in hooks), path


def test_base_is_untouched_while_adapted_and_after_removal(host, adapt_host):
    model, base = adapt_host()
    x = host.inputs()
    model(x).sum().backward()
    own = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    assert list(own) == list(base.state_dict())
    assert all(torch.equal(own[name], tensor) for name, tensor in base.state_dict().items())
    remove_adapters(model)
    assert all(
        torch.equal(model.state_dict()[k], tensor) for k, tensor in base.state_dict().items()
    )
    base.requires_grad_(False)  # torch chooses the kernel of attention by it
    assert torch.equal(model(x), base(x))


def test_saved_and_loaded_adapters_compute_the_same(host, adapt_host, tmp_path):
    model, base = adapt_host()
    x = host.inputs()
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(1)
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base(x), model(x))
    assert list(adapter_state_dict(base)) == list(adapter_state_dict(model))


def test_gradient_checkpointing_gives_the_same_gradients(host, adapt_host):
    model, _ = adapt_host()
    x = host.inputs(requires_grad=True)
    wanted = [x, *adapter_parameters(model)]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    y = checkpoint(model, x, use_reentrant=False)
    assert_near(torch.autograd.grad(y.square().sum(), wanted), expected)


def test_bf16_autocast_is_near_fp32(host, adapt_host):
    model, _ = adapt_host()
    x = host.inputs(requires_grad=True)
    expected_y = model(x)
    direction = torch.randn_like(expected_y)
    wanted = [x, *adapter_parameters(model)]
    expected = torch.autograd.grad(expected_y, wanted, direction)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, wanted, direction.bfloat16())
    for one, other in zip(grads, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.isfinite().all()
        assert (one - other).norm() < 0.1 * other.norm() + 0.05
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        evaluated = model(x).float()
    assert distance(evaluated, expected_y.detach()) < 0.05


def test_merging_under_autocast_still_sums_in_fp32(method, adapt, plain):
    model, base, _ = adapt(nn.Sequential(nn.Linear(8, 8)), method, targets=["0"])
    by_hand = plain(model, base)
    with torch.autocast("cpu", torch.bfloat16):
        merge_and_unload(model)
    for name, weight in by_hand.state_dict().items():
        assert_near(model.state_dict()[name], weight, terms=8)


def train_over_bf16(host, method, adapt):
    model, base, _ = adapt(host.build().bfloat16(), method, targets=host.targets)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model))
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.01)
    x = host.inputs(dtype=torch.bfloat16)
    for _ in range(20):
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


def assert_rounded_once(actual, exact):
    """Asserts that bf16 numbers are within half a unit of exact ones, and fp32 rounding of it."""
    assert actual.dtype == torch.bfloat16
    half = (exact.float() * (torch.finfo(torch.bfloat16).eps / 2 + 1e-5)).abs() + 1e-6
    assert ((actual.float() - exact.float()).abs() <= half).all()


def test_merging_into_bf16_rounds_once(method, adapt, dense_weights, disturb):
    model, base, _ = adapt(nn.Sequential(nn.Linear(8, 8)).bfloat16(), method, targets=["0"])
    expected = dense_weights(model, deepcopy(base).float())
    merge_and_unload(model)
    for name, weight in expected.items():
        assert_rounded_once(model.get_parameter(name), weight.detach())
    model, base, _ = adapt(nn.Sequential(nn.Linear(64, 64)).bfloat16(), "kradapter", targets=["0"])
    add_adapters(model, "lora", targets=["0"], adapter_name="second")
    set_adapter(model, "default", "second")
    disturb(model)
    deltas = [injected_adapters(model, name)[0].adapter.delta() for name in ("default", "second")]
    merge_and_unload(model)
    assert_rounded_once(model[0].weight, (base[0].weight.float() + sum(deltas)).detach())


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("kradapter", (8, 8)),
        ("kradapter", (12, 6)),
        ("kradapter", (6, 12)),
        ("lora", (12, 6)),
        ("dora", (12, 6)),
    ],
)
def test_compiled_linear_gives_the_same_outputs_and_gradients(method, sizes, adapt, request):
    if request.config.getoption("--noise"):
        pytest.skip("torch does not compile within a dispatch mode")
    model, _, _ = adapt(nn.Sequential(nn.Linear(*sizes)), method, targets=["0"])
    x = torch.randn(4, sizes[0], requires_grad=True)
    wanted = [x, *adapter_parameters(model)]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        grads = torch.autograd.grad(y.square().sum(), wanted)
    assert_near(y, model(x))
    assert_near(grads, expected, condition=4)


def test_merged_block_computes_as_the_adapted_model(host, adapt_host):
    model, base = adapt_host()
    x = host.inputs()
    adapted = model(x).detach()
    with merged(model):
        assert_near(model(x).detach(), adapted)
    assert torch.equal(model(x), adapted)
    remove_adapters(model)
    base.requires_grad_(False)
    assert torch.equal(model(x), base(x))
