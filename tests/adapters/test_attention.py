import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from vlkr.adapters import adapter_parameters, add_adapters, merge_and_unload, set_adapter
from vlkr.errors import VlkrError

WIDTH, HEADS, BATCH, QUERIES, KEYS = 16, 4, 3, 6, 5


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
    "a head's weights": {"need_weights": True, "average_attn_weights": False},
}
INPUTS = {"self": self_inputs, "cross": cross_inputs, "three": three_inputs}


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


def assert_same(found, expected):
    output, weights = found
    torch.testing.assert_close(output, expected[0], rtol=1e-5, atol=2e-6)
    assert (weights is None) == (expected[1] is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=list(INPUTS))
@pytest.mark.parametrize("need", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_equals_the_untouched_block(pair, mask, need, inputs):
    model, reference = pair(batch_first=True)
    x = inputs()
    masks = mask(x[1].shape[1])
    for training in (True, False):
        model.train(training), reference.train(training)
        assert_same(model(*x, **masks, **need), reference(*x, **masks, **need))
        with torch.no_grad():
            assert_same(model(*x, **masks, **need), reference(*x, **masks, **need))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=list(INPUTS))
@pytest.mark.parametrize("need", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("mask", ["none", "causal float", "3-D bool", "padding"])
def test_equals_the_untouched_block_with_the_sequence_first(pair, mask, need, inputs):
    model, reference = pair(batch_first=False)
    masks = MASKS[mask](inputs()[1].shape[1])
    x = [t.transpose(0, 1) for t in inputs()]
    if inputs is self_inputs:
        x = [x[0]] * 3
    assert_same(model(*x, **masks, **need), reference(*x, **masks, **need))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=list(INPUTS))
@pytest.mark.parametrize("need", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("batch_first", [True, False])
def test_equals_the_untouched_block_without_a_batch(pair, batch_first, need, inputs):
    model, reference = pair(batch_first=batch_first)
    x = [t[0] for t in inputs()]
    if inputs is self_inputs:
        x = [x[0]] * 3
    keys = x[1].shape[0]
    for masks in (
        {},
        {"attn_mask": boolean(QUERIES, keys)},
        {"attn_mask": boolean(HEADS, QUERIES, keys)},
        {"key_padding_mask": boolean(keys)},
    ):
        assert_same(model(*x, **masks, **need), reference(*x, **masks, **need))


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_hint_comes_with_its_mask(pair, need_weights):
    model, reference = pair(batch_first=True)
    x = self_inputs()
    options = {
        "attn_mask": causal(QUERIES, QUERIES),
        "is_causal": True,
        "need_weights": need_weights,
    }
    assert_same(model(*x, **options), reference(*x, **options))
    for one in (model, reference):
        with pytest.raises(RuntimeError, match="attn_mask"):
            one(*x, is_causal=True)


def test_block_without_bias(pair):
    model, reference = pair(batch_first=True, bias=False)
    for inputs in INPUTS.values():
        x = inputs()
        assert_same(model(*x), reference(*x))


def test_a_fully_masked_row_is_nan_in_both(pair):
    model, reference = pair(batch_first=True)
    x = self_inputs()
    mask = torch.zeros(QUERIES, QUERIES, dtype=torch.bool)
    mask[2] = True
    found, expected = (one(*x, attn_mask=mask)[0] for one in (model, reference))
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_dropout_of_attention_is_the_blocks_own(pair):
    model, reference = pair(batch_first=True, dropout=0.5)
    x = self_inputs()
    assert_same(model.eval()(*x), reference.eval()(*x))
    model.train(), reference.train()
    outputs = []
    for one in (model, reference):
        torch.manual_seed(3)
        outputs.append(one(*x)[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=2e-6)
    assert not torch.allclose(model(*x)[0], model(*x)[0])


@pytest.mark.parametrize("targets", [["q", "k", "v", "out"], ["qkv", "out"], ["v"]])
@pytest.mark.parametrize("inputs", [cross_inputs, three_inputs])
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
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, direction),
        torch.autograd.grad(expected, wanted, direction),
        rtol=1e-9,
        atol=1e-11,
    )


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


def test_lora_dropout_acts_in_attention_while_training(adapt):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    adapt(nn.Sequential(attention), "lora", targets=["q", "v"], dropout=0.5)
    x = self_inputs()
    attention.train()
    assert not torch.allclose(attention(*x)[0], attention(*x)[0])
    attention.eval()
    assert torch.equal(attention(*x)[0], attention(*x)[0])


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_settings_that_no_clip_has_are_refused_and_leave_the_block_alone(options):
    attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with pytest.raises(VlkrError, match="add_bias_kv or add_zero_attn"):
        add_adapters(nn.Sequential(attention), "kradapter", targets=["q"])
    assert type(attention) is nn.MultiheadAttention
    assert all(p.requires_grad for p in attention.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", [["q", "v"], ["*.linear1"], ["out"]])
def test_torch_encoder_layer_does_not_bypass_its_adapters(targets, training, adapt, plain):
    # In eval mode the layer reads its weights itself and calls one fused kernel.
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True)
    model, base, _ = adapt(nn.Sequential(layer), "kradapter", targets=targets)
    x = torch.randn(BATCH, QUERIES, WIDTH)
    model.train(training)
    expected = plain(model, base)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class ScaledAttention(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 2 * output, weights


class NamedAttention(nn.MultiheadAttention):
    """A subclass that only adds a method."""

    def describe(self):
        return f"{self.num_heads} heads"


@pytest.mark.parametrize("cls", [ScaledAttention, NamedAttention])
def test_subclasses_keep_what_they_add(cls, adapt, plain):
    attention = cls(WIDTH, HEADS, batch_first=True)
    model, base, _ = adapt(nn.Sequential(attention), "kradapter", targets=["q", "k", "v", "out"])
    x = self_inputs()
    assert_same(attention(*x), plain(model, base)[0](*x))
    assert isinstance(attention, cls)
    if cls is NamedAttention:
        assert attention.describe() == "4 heads"
    merge_and_unload(model)
    assert type(attention) is cls


def test_a_forward_that_raises_leaves_the_base_as_it_was(hosts, adapt):
    model, base, _ = adapt(
        hosts["open-clip-split"].build(), "kradapter", targets=["q", "k", "v", "out"]
    )
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 3))
    state = model.state_dict()
    for name, p in base.named_parameters():
        assert torch.equal(state[name], p)


def test_dropout_is_refused_where_the_weights_are_composed(hosts):
    model = hosts["open-clip-split"].build()
    before = deepcopy(model)
    with pytest.raises(VlkrError, match=r"0\.attn .OpenClipAttention.*dropout"):
        add_adapters(model, "lora", targets=["q"], dropout=0.1)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
