from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlkr.adapters import ADAPTERS, adapter_parameters, add_adapters
from vlkr.adapters.inject import injected_adapters

OPTIONS = {
    "lora": {"rank": 3, "alpha": 5.0},
    "dora": {"rank": 3, "alpha": 5.0},
    "vera": {"rank": 4},
    "randlora": {"rank": 3, "alpha": 3.0},
    "sinlora": {"rank": 3, "frequency": 2.0},
}


def pytest_generate_tests(metafunc):
    """Runs every method on two hosts and every host with two methods."""
    own = str([mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")])
    wanted = [n for n in ("host", "method") if n in metafunc.fixturenames and f"'{n}'" not in own]
    if wanted == ["host", "method"]:
        pairs = dict.fromkeys(
            [(host, method) for host in ("linear-wide", "mha-split") for method in ADAPTERS]
            + [(host, method) for host in HOSTS for method in ("kradapter", "lora")]
        )
        values = [(HOSTS[host], method) for host, method in pairs]
        metafunc.parametrize(("host", "method"), values, ids=map("-".join, pairs))
    elif wanted == ["host"]:
        metafunc.parametrize("host", HOSTS.values(), ids=list(HOSTS))
    elif wanted == ["method"]:
        metafunc.parametrize("method", list(ADAPTERS))


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        context = x[..., : self.attn.kdim]
        keys = x if self.attn._qkv_same_embed_dim else context
        return self.attn(x, keys, keys, need_weights=False)[0]


class OpenClipAttention(nn.Module):
    """As on open_clip's main branch: nn.MultiheadAttention's names in a class of its own."""

    def __init__(self):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8) / 3)
        self.in_proj_bias = nn.Parameter(torch.randn(24) / 3)
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(-2, -3) for part in qkv)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(-2, -3).flatten(-2))


class TimmAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-2, -3)
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return self.attn(x)


@dataclass
class Host:
    """A small model, which of its weights to adapt and the width of its input.

    ``slots`` are the adapted ``(parameter, first row, past-the-last row)``, written by hand.
    """

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    width: int
    slots: tuple[tuple[str, int, int], ...]

    def inputs(self, **options):
        return torch.randn(2, 5, self.width, **options)


def _linear(in_features, out_features):
    return Host(
        lambda: nn.Sequential(nn.Linear(in_features, out_features)),
        ("0",),
        in_features,
        (("0.weight", 0, out_features),),
    )


def _attention(build, targets, fused, out):
    rows = {"q": (0, 8), "k": (8, 16), "v": (16, 24), "qkv": (0, 24)}
    slots = tuple((out, 0, 8) if t == "out" else (fused, *rows[t]) for t in targets)
    return Host(lambda: nn.Sequential(build()), targets, 8, slots)


def _attentions(name, build, fused, out):
    return {
        f"{name}-split": _attention(build, ("q", "k", "v", "out"), fused, out),
        f"{name}-fused": _attention(build, ("qkv", "out"), fused, out),
    }


HOSTS = {
    "linear-square": _linear(8, 8),
    "linear-wide": _linear(12, 6),
    "linear-tall": _linear(6, 12),
    **_attentions("mha", SelfAttention, "0.attn.in_proj_weight", "0.attn.out_proj.weight"),
    "mha-some": _attention(SelfAttention, ("q", "v"), "0.attn.in_proj_weight", ""),
    "mha-kdim": Host(
        lambda: nn.Sequential(SelfAttention(kdim=5, vdim=5)),
        ("q", "k", "v", "out"),
        8,
        (
            ("0.attn.q_proj_weight", 0, 8),
            ("0.attn.k_proj_weight", 0, 8),
            ("0.attn.v_proj_weight", 0, 8),
            ("0.attn.out_proj.weight", 0, 8),
        ),
    ),
    **_attentions(
        "open-clip",
        lambda: Block(OpenClipAttention()),
        "0.attn.in_proj_weight",
        "0.attn.out_proj.weight",
    ),
    **_attentions(
        "timm", lambda: Block(TimmAttention()), "0.attn.qkv.weight", "0.attn.proj.weight"
    ),
}


@pytest.fixture(scope="session")
def hosts():
    return HOSTS


@pytest.fixture
def options(method):
    return OPTIONS.get(method, {})


@pytest.fixture
def adapt():
    """Adds adapters; returns the model, an untouched copy of it and the matched targets."""

    def add(model, method, *, trained=True, **keywords):
        base = deepcopy(model)
        targets = add_adapters(model, method, **{**OPTIONS.get(method, {}), **keywords})
        if trained:
            disturb(model)
        return model, base, targets

    return add


def disturb(model, std=0.3):
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.add_(std * torch.randn_like(p))


@pytest.fixture(name="disturb")
def _disturb():
    """Moves every factor off its start, as training would."""
    return disturb


@pytest.fixture
def adapt_host(host, method, adapt):
    """Makes the host, adapted and as it was."""

    def add(dtype=torch.float32, **keywords):
        model, base, _ = adapt(host.build().to(dtype), method, targets=host.targets, **keywords)
        return model.to(dtype), base

    return add


@pytest.fixture
def dense_weights():
    """Names and values, differentiable in the factors, of the weights ``base + delta``."""

    def dense(model, base):
        weights = {}
        for injected in injected_adapters(model):
            name = f"{injected.module}.{injected.slot.parameter}".lstrip(".")
            weight = base.get_parameter(name)
            rows = slice(*(injected.slot.rows or (None,)))
            weights.setdefault(name, weight.clone())[rows] += injected.adapter.delta(weight[rows])
        return weights

    return dense


@pytest.fixture
def plain(dense_weights):
    """A copy of the base model with the adapted weights written into it by hand."""

    def written(model, base):
        copy = deepcopy(base)
        with torch.no_grad():
            for name, weight in dense_weights(model, base).items():
                copy.get_parameter(name).copy_(weight)
        return copy

    return written


@pytest.fixture
def tiny_clip():
    """An open_clip model with 2 visual and 3 text blocks of width 32."""
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=2, width=32, head_width=16, patch_size=8, image_size=16
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=8, vocab_size=64, width=32, heads=2, layers=3
        ),
    ).eval()
