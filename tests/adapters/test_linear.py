import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from vlkr.adapters import (
    adapter_parameters,
    add_adapters,
    merge_and_unload,
    merged,
    set_adapter,
)
from vlkr.adapters.inject import injected_adapters
from vlkr.errors import VlkrError


@pytest.fixture
def linear(adapt):
    def make(method, in_features=12, out_features=8, **options):
        module = nn.Sequential(nn.Linear(in_features, out_features))
        return adapt(module, method, targets=["0"], **options)[:2]

    return make


def kept_bytes(model, x):
    """Bytes of the distinct storages that a forward keeps for its backward."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sum(storages.values())


@pytest.mark.parametrize(("in_features", "out_features"), [(256, 256), (256, 512), (512, 256)])
@pytest.mark.parametrize("rule", ["reference", "balanced"])
def test_kradapter_keeps_its_factors_and_input_for_backward_and_no_change(
    in_features, out_features, rule, linear
):
    model, base = linear("kradapter", in_features, out_features, rule=rule)
    base.requires_grad_(False)
    x = torch.randn(8, in_features, requires_grad=True)
    factors = sum(p.numel() * p.element_size() for p in adapter_parameters(model))
    frozen = kept_bytes(base, x)
    assert frozen >= 4 * in_features * out_features  # the weight counts in both
    needed = frozen + factors + x.numel() * x.element_size()
    assert kept_bytes(model, x) <= 1.01 * needed


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 3, 4, 12), (0, 12), (2, 0, 12)])
def test_any_number_of_leading_dimensions(shape, method, linear, plain):
    model, base = linear(method)
    x = torch.randn(shape, requires_grad=True)
    reference = plain(model, base)
    y = model(x)
    torch.testing.assert_close(y, reference(x))
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *adapter_parameters(model)], direction)
    expected = torch.autograd.grad(reference(x), x, direction)
    torch.testing.assert_close(found[0], *expected)
    assert all(grad.isfinite().all() for grad in found)


def test_input_that_is_not_contiguous(method, linear, plain):
    model, base = linear(method)
    x = torch.randn(12, 5, 3).transpose(0, 2)
    y = model(x)
    torch.testing.assert_close(y, plain(model, base)(x))
    y.mT.sum().backward()


def test_input_without_gradient_still_trains_the_factors(method, linear, dense_weights):
    model, base = linear(method)
    x = torch.randn(5, 12)
    factors = adapter_parameters(model)
    found = torch.autograd.grad(model(x).square().sum(), factors)
    dense = functional_call(base, dense_weights(model, base), x)
    expected = torch.autograd.grad(dense.square().sum(), factors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_factor_gets_no_gradient(linear, dense_weights):
    model, base = linear("kradapter")
    u, v = model[0].adapters["default"]["weight"].u, model[0].adapters["default"]["weight"].v
    u.requires_grad_(False)
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    assert u.grad is None
    dense = functional_call(base, dense_weights(model, base), x)
    torch.testing.assert_close(
        v.grad, *torch.autograd.grad(dense.square().sum(), v), rtol=1e-4, atol=1e-5
    )


def test_trainable_bias_and_base_weight_get_their_gradients(linear, dense_weights):
    model, base = linear("kradapter")
    model[0].bias.requires_grad_()
    model[0].weight.requires_grad_()
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    functional_call(base, dense_weights(model, base), x).square().sum().backward()
    torch.testing.assert_close(model[0].bias.grad, base[0].bias.grad)
    torch.testing.assert_close(model[0].weight.grad, base[0].weight.grad)


def test_functional_call_with_other_factors_gets_their_gradients(method, linear):
    model, _ = linear(method)
    model.double()
    x = torch.randn(5, 12, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters() if ".adapters." in name]
    other = {
        name: (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_()
        for name, p in model.named_parameters()
        if name in names
    }
    swapped = functional_call(model, other, x).square().sum()
    found = torch.autograd.grad(swapped, list(other.values()))
    for name in names:
        model.get_parameter(name).data.copy_(other[name].detach())
    expected = torch.autograd.grad(
        model(x).square().sum(), [model.get_parameter(name) for name in names]
    )
    torch.testing.assert_close(found, expected)


def test_two_adapters_on_one_weight_add_up(adapt, disturb, dense_weights):
    model, base, _ = adapt(nn.Sequential(nn.Linear(12, 8)), "kradapter", targets=["0"])
    add_adapters(model, "lora", targets=["0"], adapter_name="second", rank=2)
    set_adapter(model, "default", "second")
    disturb(model)
    first = model[0].adapters["default"]["weight"].delta()
    second = model[0].adapters["second"]["weight"].delta()
    x = torch.randn(5, 12)
    expected = F.linear(x, base[0].weight + first + second, base[0].bias)
    torch.testing.assert_close(model(x), expected)
    factors = adapter_parameters(model)
    torch.testing.assert_close(
        torch.autograd.grad(model(x).square().sum(), factors),
        torch.autograd.grad(expected.square().sum(), factors),
        rtol=1e-4,
        atol=1e-5,
    )
    merge_and_unload(model)
    torch.testing.assert_close(model(x), expected)


def test_adapters_of_weight_and_bias_share_a_layer(adapt, disturb):
    model, base, _ = adapt(nn.Sequential(nn.Linear(12, 8)), "kradapter", targets=["0"])
    add_adapters(model, "bitfit", targets=["0"], adapter_name="second")
    set_adapter(model, "default", "second")
    disturb(model)
    change, bias = (injected_adapters(model, n)[0].adapter.delta() for n in ("default", "second"))
    x = torch.randn(5, 12)
    expected = F.linear(x, base[0].weight + change, base[0].bias + bias)
    torch.testing.assert_close(model(x), expected)
    merge_and_unload(model)
    torch.testing.assert_close(model(x), expected)


def test_a_second_backward_gives_the_same_gradients(linear, method):
    model, _ = linear(method)
    x = torch.randn(5, 12, requires_grad=True)
    wanted = [x, *adapter_parameters(model)]
    loss = model(x).square().sum()
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    again = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


class Named(nn.Linear):
    """A subclass that only adds a method."""

    def describe(self):
        return f"{self.in_features} to {self.out_features}"


class Normed(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)


@pytest.mark.parametrize("cls", [Named, Normed])
def test_subclasses_of_linear_keep_what_they_add(cls, adapt, plain):
    model, base, _ = adapt(nn.Sequential(cls(12, 8)), "kradapter", targets=["0"])
    x = torch.randn(5, 12)
    torch.testing.assert_close(model(x), plain(model, base)(x))
    assert isinstance(model[0], cls)
    if cls is Named:
        assert model[0].describe() == "12 to 8"
    merge_and_unload(model)
    assert type(model[0]) is cls


def test_a_weight_shared_by_two_layers_is_refused_or_merges_right(adapt):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    try:
        model, base, _ = adapt(model, "kradapter", targets=["*"])
    except VlkrError:
        return
    x = torch.randn(4, 6)
    adapted = model(x).detach()
    with merged(model):
        torch.testing.assert_close(model(x), adapted)
    assert torch.equal(model[0].weight, base[0].weight)
    merge_and_unload(model)
    torch.testing.assert_close(model(x), adapted)


def test_a_layer_used_twice_gathers_both_gradients(adapt, dense_weights):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    model, base, _ = adapt(Twice(), "kradapter", targets=["layer"])
    x = torch.randn(4, 6)
    factors = adapter_parameters(model)
    dense = functional_call(base, dense_weights(model, base), x)
    torch.testing.assert_close(
        torch.autograd.grad(model(x).square().sum(), factors),
        torch.autograd.grad(dense.square().sum(), factors),
        rtol=1e-4,
        atol=1e-5,
    )
