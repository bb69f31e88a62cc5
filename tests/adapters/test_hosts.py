"""Hosts of adapters: linear layers, attention of every kind, and what torch does with modules."""

import copy
import math
import pickle
import threading
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, tolerance
from torch import nn
from torch.func import functional_call, vmap

from vlkr.adapters import (
    adapter_parameters,
    add_adapters,
    merge_and_unload,
    remove_adapters,
    set_adapter,
    set_adapter_scale,
)
from vlkr.adapters.hosts import AdapterHost, adapter_layers, weights_hash
from vlkr.adapters.inject import injected_adapters
from vlkr.errors import VlkrError

WIDTH, HEADS, BATCH, QUERIES, KEYS = 16, 4, 3, 6, 5


# Linear layers


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


@pytest.mark.parametrize("sizes", [(256, 256), (256, 512), (512, 256)])
@pytest.mark.parametrize("rule", ["reference", "balanced"])
def test_kradapter_keeps_its_factors_and_input_for_backward_and_no_update(sizes, rule, linear):
    model, base = linear("kradapter", *sizes, rule=rule)
    base.requires_grad_(False)
    x = torch.randn(8, sizes[0], requires_grad=True)
    factors = sum(p.numel() * p.element_size() for p in adapter_parameters(model))
    frozen = kept_bytes(base, x)
    assert frozen >= 4 * sizes[0] * sizes[1]  # the weight counts in both
    assert kept_bytes(model, x) <= 1.01 * (frozen + factors + x.numel() * x.element_size())


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 3, 4, 12), (0, 12), (2, 0, 12)])
@pytest.mark.parametrize("method", ["kradapter", "lora", "krona"])
def test_any_number_of_leading_dimensions(shape, method, linear, plain):
    model, base = linear(method)
    x = torch.randn(shape, requires_grad=True)
    reference = plain(model, base)
    y = model(x)
    assert_near(y, reference(x))
    direction = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *adapter_parameters(model)], direction)
    assert_near(grads[0], torch.autograd.grad(reference(x), x, direction)[0])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("method", ["kradapter", "lora", "krona"])
def test_input_that_is_not_contiguous_and_needs_no_gradient(method, linear, plain, dense_weights):
    model, base = linear(method)
    x = torch.randn(12, 5, 3).transpose(0, 2)
    y = model(x)
    assert_near(y, plain(model, base)(x))
    factors = adapter_parameters(model)
    grads = torch.autograd.grad(y.square().sum(), factors)
    dense = functional_call(base, dense_weights(model, base), x)
    assert_near(grads, torch.autograd.grad(dense.square().sum(), factors), condition=4)


def test_trained_and_frozen_tensors_get_their_gradients(linear, dense_weights):
    model, base = linear("kradapter")
    factors = model[0].adapters["default"]["weight"]
    factors.u.requires_grad_(False)
    base.requires_grad_()
    model[0].bias.requires_grad_()
    model[0].weight.requires_grad_()
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    assert factors.u.grad is None
    wanted = [factors.v, base[0].weight, base[0].bias]
    dense = functional_call(base, dense_weights(model, base), x)
    expected = torch.autograd.grad(dense.square().sum(), wanted)
    assert_near([factors.v.grad, model[0].weight.grad, model[0].bias.grad], expected, condition=4)


def test_two_adapters_on_one_weight_and_one_on_its_bias_add_up(adapt, disturb):
    model, base, _ = adapt(nn.Sequential(nn.Linear(12, 8)), "kradapter", targets=["0"])
    names = {"default": "kradapter", "second": "lora", "third": "bitfit"}
    for name in ("second", "third"):
        add_adapters(model, names[name], targets=["0"], adapter_name=name)
    set_adapter(model, *names)
    disturb(model)
    first, second, bias = (injected_adapters(model, name)[0].adapter.delta() for name in names)
    x = torch.randn(5, 12)
    expected = F.linear(x, base[0].weight + first + second, base[0].bias + bias)
    assert_near(model(x), expected)
    factors = adapter_parameters(model)
    assert_near(
        torch.autograd.grad(model(x).square().sum(), factors),
        torch.autograd.grad(expected.square().sum(), factors),
        condition=4,
    )
    merge_and_unload(model)
    assert_near(model(x), expected)


class NamedLinear(nn.Linear):
    """A subclass that only adds a method."""

    def describe(self):
        return "a name"


class NormedLinear(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)


class NamedAttention(nn.MultiheadAttention):
    """A subclass that only adds a method."""

    def describe(self):
        return "a name"


class ScaledAttention(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 2 * output, weights


@pytest.mark.parametrize("cls", [NamedLinear, NormedLinear, NamedAttention, ScaledAttention])
def test_subclasses_keep_what_they_add(cls, adapt, plain):
    is_linear = issubclass(cls, nn.Linear)
    module = cls(WIDTH, WIDTH) if is_linear else cls(WIDTH, HEADS, batch_first=True)
    targets = ["0"] if is_linear else ["q", "k", "v", "out"]
    model, base, _ = adapt(nn.Sequential(module), "kradapter", targets=targets)
    x = self_inputs()
    x = x[:1] if is_linear else x
    assert_same(module(*x), plain(model, base)[0](*x))
    assert isinstance(module, cls)
    if cls in (NamedLinear, NamedAttention):
        assert module.describe() == "a name"
    merge_and_unload(model)
    assert type(module) is cls


def test_a_weight_shared_by_two_layers_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with pytest.raises(VlkrError, match="0 and 1 share one weight; adapt only one of them"):
        add_adapters(model, "kradapter", targets=["*"])
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


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
    assert_near(
        torch.autograd.grad(model(x).square().sum(), factors),
        torch.autograd.grad(dense.square().sum(), factors),
        condition=4,
    )


# Attention


def self_inputs():
    x = torch.randn(BATCH, QUERIES, WIDTH)
    return x, x, x


def cross_inputs():
    keys = torch.randn(BATCH, KEYS, WIDTH)
    return torch.randn(BATCH, QUERIES, WIDTH), keys, keys


def three_inputs():
    query, keys, _ = cross_inputs()
    return query, keys, torch.randn(BATCH, KEYS, WIDTH)


def causal(queries, keys):
    return torch.full((queries, keys), -math.inf).triu(1 + max(0, keys - queries))


def boolean(*shape):
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


MASKS = {
    "none": lambda keys: {},
    "causal float": lambda keys: {"attn_mask": causal(QUERIES, keys)},
    "additive float": lambda keys: {"attn_mask": torch.randn(QUERIES, keys)},
    "bool": lambda keys: {"attn_mask": boolean(QUERIES, keys)},
    "3-D bool": lambda keys: {"attn_mask": boolean(BATCH * HEADS, QUERIES, keys)},
    "3-D float": lambda keys: {"attn_mask": torch.randn(BATCH * HEADS, QUERIES, keys)},
    "padding": lambda keys: {"key_padding_mask": boolean(BATCH, keys)},
    "float padding": lambda keys: {"key_padding_mask": torch.randn(BATCH, keys)},
    "bool and padding": lambda keys: {
        "attn_mask": boolean(QUERIES, keys),
        "key_padding_mask": boolean(BATCH, keys),
    },
    "3-D float and float padding": lambda keys: {
        "attn_mask": torch.randn(BATCH * HEADS, QUERIES, keys),
        "key_padding_mask": torch.randn(BATCH, keys),
    },
}
WEIGHTS = {
    "no weights": {"need_weights": False},
    "averaged weights": {"need_weights": True},
    "weights per head": {"need_weights": True, "average_attn_weights": False},
}
INPUTS = {"self": self_inputs, "cross": cross_inputs, "three": three_inputs}
#: every mask meets every other option, every pair of other options meets
CASES = [
    (mask, list(WEIGHTS)[i % 3], inputs, batch_first)
    for i, mask in enumerate(MASKS)
    for inputs, batch_first in product(INPUTS, [True, False])
]


@pytest.fixture(params=["start", "split", "fused"])
def pair(request, adapt, plain):
    """Makes an adapted nn.MultiheadAttention and a plain one that computes the same."""

    def make(**options):
        targets = ["qkv", "out"] if request.param == "fused" else ["q", "k", "v", "out"]
        attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        if attention.in_proj_bias is not None:
            nn.init.normal_(attention.in_proj_bias)
        model, base, _ = adapt(
            nn.Sequential(attention), "kradapter", targets=targets, trained=request.param != "start"
        )
        return model[0], plain(model, base)[0]

    return make


def assert_same(output, expected):
    """Asserts that outputs are near, with weights of attention or None beside them or not."""
    if isinstance(expected, torch.Tensor):
        output, expected = (output,), (expected,)
    assert [part is None for part in output] == [part is None for part in expected]
    pairs = [(a, b) for a, b in zip(output, expected, strict=True) if b is not None]
    assert_near([a for a, _ in pairs], [b for _, b in pairs])


def test_attention_equals_the_untouched_block(pair):
    for mask, need, inputs, batch_first in CASES:
        model, reference = pair(batch_first=batch_first)
        x = INPUTS[inputs]()
        options = MASKS[mask](x[1].shape[1]) | WEIGHTS[need]
        if not batch_first:
            x = [t.transpose(0, 1) for t in x]
        if inputs == "self":
            x = [x[0]] * 3
        for training in (True, False):
            model.train(training), reference.train(training)
            assert_same(model(*x, **options), reference(*x, **options))
        with torch.no_grad():
            assert_same(model(*x, **options), reference(*x, **options))


@pytest.mark.parametrize("inputs", INPUTS)
def test_attention_equals_the_untouched_block_without_a_batch(pair, inputs):
    for batch_first, need in product([True, False], WEIGHTS.values()):
        model, reference = pair(batch_first=batch_first)
        x = [t[0] for t in INPUTS[inputs]()]
        x = [x[0]] * 3 if inputs == "self" else x
        keys = x[1].shape[0]
        for masks in (
            {},
            {"attn_mask": boolean(QUERIES, keys)},
            {"attn_mask": boolean(HEADS, QUERIES, keys)},
            {"key_padding_mask": boolean(keys)},
        ):
            assert_same(model(*x, **masks, **need), reference(*x, **masks, **need))


def test_settings_of_attention(pair):
    model, reference = pair(batch_first=True)
    x = self_inputs()
    for need_weights in (True, False):  # the hint comes with its mask
        options = {"attn_mask": causal(QUERIES, QUERIES), "need_weights": need_weights}
        assert_same(model(*x, is_causal=True, **options), reference(*x, is_causal=True, **options))
    for one in (model, reference):
        with pytest.raises(RuntimeError, match="attn_mask"):
            one(*x, is_causal=True)
    mask = torch.zeros(QUERIES, QUERIES, dtype=torch.bool)
    mask[2] = True  # a fully masked row is not a number in both
    outputs, expected = (one(*x, attn_mask=mask)[0] for one in (model, reference))
    assert torch.equal(outputs.isnan(), expected.isnan())
    assert outputs.isnan().any()
    assert_near(outputs.nan_to_num(), expected.nan_to_num())
    model, reference = pair(batch_first=True, bias=False)
    for inputs in INPUTS.values():
        x = inputs()
        assert_same(model(*x), reference(*x))


def test_dropout_of_attention_is_the_blocks_own(pair):
    model, reference = pair(batch_first=True, dropout=0.5)
    x = self_inputs()
    assert_same(model.eval()(*x), reference.eval()(*x))
    model.train(), reference.train()
    outputs = []
    for one in (model, reference):
        torch.manual_seed(3)
        outputs.append(one(*x)[0])
    assert_near(*outputs)
    assert not torch.allclose(model(*x)[0], model(*x)[0])


@pytest.mark.parametrize("targets", [["q", "k", "v", "out"], ["qkv", "out"], ["v"]])
@pytest.mark.parametrize("inputs", [cross_inputs, three_inputs])
@pytest.mark.parametrize("method", ["kradapter", "lora", "bitfit"])
def test_cross_attention_has_the_gradients_of_dense_autograd(
    method, inputs, targets, adapt, dense_weights
):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    model, base, _ = adapt(nn.Sequential(attention), method, targets=targets)
    model.double()
    x = [t.double().requires_grad_() for t in inputs()]
    wanted = [*x[:2], *adapter_parameters(model)]
    mask = MASKS["bool"](KEYS)
    y = model[0](*x, **mask)[0]
    dense = {name.removeprefix("0."): w for name, w in dense_weights(model, base).items()}
    expected = functional_call(base[0], dense, tuple(x), mask)[0]
    assert_near(y, expected)
    direction = torch.randn_like(y)
    grads = torch.autograd.grad(y, wanted, direction)
    assert_near(grads, torch.autograd.grad(expected, wanted, direction), condition=8, scale=1.0)


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=list(INPUTS))
@pytest.mark.parametrize(("one", "other"), [("kradapter", "lora"), ("lora", "kradapter")])
def test_an_adapter_of_the_whole_and_one_of_a_slice_add_up(one, other, inputs, adapt, disturb):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    model, base, _ = adapt(nn.Sequential(attention), one, targets=["qkv"])
    add_adapters(model, other, targets=["v"], adapter_name="second")
    set_adapter(model, "default", "second")
    disturb(model)
    with torch.no_grad():
        base[0].in_proj_weight += attention.adapters["default"]["qkv"].delta()
        base[0].in_proj_weight[2 * WIDTH :] += attention.adapters["second"]["v"].delta()
    x = inputs()
    expected = base[0](*x)
    assert_same(attention(*x), expected)
    merge_and_unload(model)
    assert_same(attention(*x), expected)


def test_lora_dropout_acts_in_attention_only_in_training(adapt, hosts):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    adapt(nn.Sequential(attention), "lora", targets=["q", "v"], dropout=0.5)
    x = self_inputs()
    attention.train()
    assert not torch.allclose(attention(*x)[0], attention(*x)[0])
    attention.eval()
    assert_near(attention(*x)[0], attention(*x)[0])
    model = hosts["open-clip-split"].build()  # composes its weights
    before = [type(m) for m in model.modules()]
    with pytest.raises(VlkrError, match=r"0\.attn .OpenClipAttention.*dropout"):
        add_adapters(model, "lora", targets=["q"], dropout=0.1)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_settings_that_no_clip_has_are_refused_and_leave_the_block_alone(options):
    attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with pytest.raises(VlkrError, match="add_bias_kv or add_zero_attn"):
        add_adapters(nn.Sequential(attention), "kradapter", targets=["q"])
    assert type(attention) is nn.MultiheadAttention
    assert all(p.requires_grad for p in attention.parameters())


@pytest.mark.parametrize("targets", [["q", "v"], ["*.linear1"], ["out"]])
def test_torch_encoder_layer_does_not_bypass_its_adapters(targets, adapt, plain):
    # In eval mode the layer reads its weights itself and calls one fused kernel.
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True)
    model, base, _ = adapt(nn.Sequential(layer), "kradapter", targets=targets)
    x = torch.randn(BATCH, QUERIES, WIDTH)
    for training in (True, False):
        model.train(training)
        expected = plain(model, base)(x)
        assert_near(model(x), expected)
        with torch.no_grad():
            assert_near(model(x), expected)


# What torch does with modules

HOSTS = ["linear-wide", "mha-split", "mha-kdim", "open-clip-split", "timm-fused"]


@pytest.fixture(params=HOSTS)
def model_and_inputs(request, hosts, adapt):
    host = hosts[request.param]
    model, _, _ = adapt(host.build(), "kradapter", targets=host.targets)
    return model.eval(), host.inputs()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(model_and_inputs, copied):
    model, x = model_and_inputs
    expected = model(x).detach()
    twin = copied(model)
    assert_near(twin(x).detach(), expected)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    set_adapter_scale(twin, 0.0)
    assert_near(model(x).detach(), expected)
    assert not torch.allclose(twin(x), expected, atol=1e-3)
    set_adapter_scale(twin, 1.0)
    merge_and_unload(twin)
    assert_near(twin(x).detach(), expected)
    for module in twin.modules():
        assert not module._forward_pre_hooks
        assert not isinstance(module, AdapterHost)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own attention
def test_functional_call_and_vmap(model_and_inputs):
    model, x = model_and_inputs
    expected = model(x).detach()
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    assert_near(functional_call(model, tensors, (x,)), expected)
    off = {n: torch.zeros_like(t) if ".adapters." in n else t for n, t in tensors.items()}
    base = functional_call(model, off, (x,)).detach()
    remove_adapters(plain := copy.deepcopy(model))
    assert_near(base, plain(x).detach())
    both = {n: torch.stack([t, off[n]]) for n, t in tensors.items()}
    results = vmap(lambda state: functional_call(model, state, (x,)))(both)
    assert_near(results, torch.stack([expected, base]))


def test_gradients_through_functional_call(model_and_inputs):
    model, x = model_and_inputs
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda state: functional_call(model, state, (x,)).square().sum())(
        tensors
    )
    other = {
        name: (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    loss = functional_call(model, other, (x,)).square().sum()
    of_other = torch.autograd.grad(loss, list(other.values()))
    model(x).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert_near([grads[n] for n in trained], [p.grad for p in trained.values()], condition=4)
    for name, p in trained.items():
        p.grad = None
        p.data.copy_(other[name].detach())
    model(x).square().sum().backward()
    assert_near(of_other, [p.grad for p in trained.values()], condition=4)


def test_threads_do_not_disturb_each_other(model_and_inputs):
    model, x = model_and_inputs
    expected = model(x).detach()
    atol = tolerance(expected, terms=64)
    outputs = []

    def work():
        for _ in range(40):
            y = model(x)
            y.square().sum().backward()
            outputs.append(torch.allclose(y, expected, rtol=0, atol=atol))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 120
    assert all(outputs)


def test_torch_compile_traces_every_host(model_and_inputs, request):
    if request.config.getoption("--noise"):
        pytest.skip("torch does not compile within a dispatch mode")
    model, x = model_and_inputs
    torch.compiler.reset()
    assert_near(torch.compile(model, backend="eager")(x), model(x))


def test_a_forward_writes_no_attribute(model_and_inputs):
    model, x = model_and_inputs

    def state():
        return {
            (path, key): tuple(map(id, value.values())) if isinstance(value, dict) else id(value)
            for path, module in model.named_modules()
            for key, value in vars(module).items()
        }

    before = state()
    model(x).sum().backward()
    assert state() == before
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.randn(2, 5, 3))
    assert state() == before


def test_hosts_of_one_class_share_one_class(hosts):
    model = nn.Sequential(*(hosts["open-clip-split"].build() for _ in range(2)))
    add_adapters(model, "kradapter", targets=["q", "out"])
    assert len({type(host) for _, host in adapter_layers(model)}) == 1


def test_a_base_module_called_adapters_counts_as_base():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters = nn.Linear(2, 2)
            self.other = nn.Linear(2, 2)

    model = Base()
    before = weights_hash(model)
    add_adapters(model, "kradapter", targets=["other"])
    assert weights_hash(model) == before
    model.adapters.weight.data.fill_(7)
    assert weights_hash(model) != before


def test_a_module_whose_attribute_a_host_needs_is_refused():
    class Own(nn.Linear):
        slots = 3

    model = nn.Sequential(Own(4, 4))
    with pytest.raises(VlkrError, match="Own has an attribute 'slots' of its own"):
        add_adapters(model, "kradapter", targets=["0"])
    assert type(model[0]) is Own
