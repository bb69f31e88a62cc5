"""Adapters: linear layers and whole training steps of ViT-B/32, against what else there is."""

from __future__ import annotations

import argparse
import logging
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from timing import interleave, median_ratio, peak_memory, write_report
from torch import Tensor, nn

import vlkr
from vlkr.models.clip import encode_text

# in_features, out_features, tokens: batch 32 of ViT-B/32, 8 of ViT-L/14 and ViT-H/14
LINEARS = {
    "B/32 attn": (768, 768, 1600),
    "B/32 fc1": (768, 3072, 1600),
    "B/32 fc2": (3072, 768, 1600),
    "L/14 attn": (1024, 1024, 2056),
    "L/14 fc1": (1024, 4096, 2056),
    "H/14 fc2": (5120, 1280, 2056),
}
RANK = 28  # LoRA's at KRAdapter's budget


class AuthorsLinear(nn.Module):
    """KRAdapter as ``x @ delta.T * scale + base(x)``, delta kept by autograd."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.weight = base.weight  # open_clip asks a projection for its type
        short, long = sorted(base.weight.shape)
        k1 = math.isqrt(short)
        self.u = nn.Parameter(torch.zeros(short, k1))
        self.v = nn.Parameter(torch.randn(short, math.ceil(long / k1)))
        self.long = long

    def forward(self, x: Tensor) -> Tensor:
        delta = (self.v.unsqueeze(2) * self.u.unsqueeze(1)).flatten(1)[:, : self.long]
        if self.base.out_features > self.base.in_features:
            delta = delta.T
        return F.linear(x, delta) * 2.0 + self.base(x)


def make_linear(kind: str, size: tuple[int, int]) -> nn.Module:
    """One candidate on a fresh ``nn.Linear``."""
    torch.manual_seed(0)
    base = nn.Linear(*size)
    if kind == "trainable":
        return base
    if kind == "frozen":
        return base.requires_grad_(False)
    if kind == "authors":
        return AuthorsLinear(base)
    model = nn.Sequential(base)
    if kind.startswith("peft"):
        import peft

        config = {
            "peft lora": peft.LoraConfig(target_modules=["0"], r=RANK),
            "peft randlora": peft.RandLoraConfig(target_modules=["0"], r=32),
        }[kind]
        return peft.get_peft_model(model, config)
    options = {"lora": {"rank": RANK}, "vera": {"rank": 256}}.get(kind, {})
    vlkr.add_adapters(model, kind, targets=["0"], **options)
    return model


def linear_step(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward, with the gradient of the input too."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        module(leaf).backward(grad)

    return run


def bench_linears(rounds: int, device: str) -> tuple[list[list[str]], dict[str, object]]:
    """The table of linear layers and the geometric means of the ratios."""
    kinds = ["frozen", "trainable", "kradapter", "authors", "lora", "peft lora"]
    kinds += ["dora", "vera", "krona", "randlora", "peft randlora", "sinlora"]
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    pairs = {"kradapter/authors": [], "lora/peft lora": [], "randlora/peft randlora": []}
    rows = [["linear", "trainable ms", *(f"{k} x" for k in kinds)]]
    for name, (in_features, out_features, tokens) in LINEARS.items():
        x = torch.randn(tokens, in_features, device=device)
        grad = torch.randn(tokens, out_features, device=device)
        steps = {
            kind: linear_step(make_linear(kind, (in_features, out_features)).to(device), x, grad)
            for kind in kinds
        }
        seconds = interleave(steps, rounds)
        for kind in kinds:
            ratios[kind].append(median_ratio(seconds, kind, "trainable"))
        for pair in pairs:
            pairs[pair].append(median_ratio(seconds, *pair.split("/")))
        base = 1000 * statistics.median(seconds["trainable"])
        rows.append([name, f"{base:.1f}", *(f"{ratios[k][-1]:.2f}" for k in kinds)])
    means = {kind: statistics.geometric_mean(r) for kind, r in ratios.items()}
    rows.append(["geometric mean", "", *(f"{means[k]:.2f}" for k in kinds)])
    pair_means = {pair: statistics.geometric_mean(r) for pair, r in pairs.items()}
    rows += [
        [f"{pair}", "", f"{value:.2f}"] + [""] * (len(kinds) - 1)
        for pair, value in pair_means.items()
    ]
    return rows, {"linear_vs_trainable": means, "linear_pairs": pair_means}


class DenseLoRALinear(nn.Module):
    """LoRA as CLIP-LoRA computes it: the dense product ``B @ A`` times the input, each forward."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ (self.lora_B @ self.lora_A).T


class SplitAttention(nn.Module):
    """A fused attention copied into four linears, each wrapped by ``wrap``."""

    def __init__(self, fused: nn.MultiheadAttention, wrap: Callable[[nn.Linear], nn.Module]):
        super().__init__()
        self.num_heads = fused.num_heads
        width = fused.embed_dim
        self.projections = nn.ModuleList()
        for i in range(3):
            linear = nn.Linear(width, width)
            linear.weight.data = fused.in_proj_weight.data[i * width : (i + 1) * width].clone()
            linear.bias.data = fused.in_proj_bias.data[i * width : (i + 1) * width].clone()
            self.projections.append(wrap(linear))
        self.out = wrap(fused.out_proj)
        self.batch_first = True

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: object):
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self.projections
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out(attended.transpose(1, 2).flatten(2)), None


def split_model(
    model: nn.Module, wrap: Callable[[nn.Linear], nn.Module], mlp: bool = True
) -> nn.Module:
    """Every projection of every block wrapped by ``wrap``."""
    model.requires_grad_(False)
    for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
        block.attn = SplitAttention(block.attn, wrap)
        if mlp:
            block.mlp.c_fc, block.mlp.c_proj = wrap(block.mlp.c_fc), wrap(block.mlp.c_proj)
    return model


def make_clip(kind: str, towers: tuple[str, ...], seed: int = 0) -> nn.Module:
    """ViT-B/32 with random weights under one method, all projections of its blocks."""
    torch.manual_seed(seed)
    logging.disable(logging.WARNING)
    model = open_clip.create_model("ViT-B-32").eval()
    logging.disable(logging.NOTSET)
    if kind == "frozen":
        return model.requires_grad_(False)
    if kind == "trainable":
        found = vlkr.adapters.find_targets(model, towers=towers)
        model.requires_grad_(False)
        for target in found:
            weight = model.get_submodule(target.module).get_parameter(target.slot.parameter)
            weight.requires_grad_(True)
        return model
    if kind == "authors":
        return split_model(model, AuthorsLinear)
    options = {"rank": RANK} if kind == "lora" else {}
    vlkr.add_adapters(model, kind, towers=towers, **options)
    return model


def image_step(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A step of the image tower: features, a scalar, backward."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss = model.encode_image(images, normalize=True).square().sum()
        if loss.requires_grad:
            loss.backward()

    return run


def few_shot_step(
    model: nn.Module, images: Tensor, labels: Tensor, prompts: Tensor, whole_text: bool
) -> Callable[[], float]:
    """Cross-entropy between images and all class prompts, and backward; gives the loss."""

    def run() -> float:
        model.zero_grad(set_to_none=True)
        image_features = model.encode_image(images, normalize=True)
        text_features = (
            model.encode_text(prompts, normalize=True)
            if whole_text
            else encode_text(model, prompts)
        )
        loss = F.cross_entropy(100 * image_features @ text_features.T, labels)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    return run


def bench_steps(rounds: int, device: str, batch: int) -> tuple[list[list[str]], dict[str, object]]:
    """Whole steps of ViT-B/32, image tower alone and both towers with 100 classes."""
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.arange(batch, device=device) % 100
    prompts = open_clip.tokenize([f"a photo of a class {i}." for i in range(100)]).to(device)
    kinds = ["trainable", "frozen", "kradapter", "authors", "lora"]
    rows = [["step", "trainable ms", *(f"{k} x" for k in kinds)]]
    figures: dict[str, object] = {}
    image_models = {kind: make_clip(kind, ("visual",)).to(device) for kind in kinds}
    image_steps = {kind: image_step(model, images) for kind, model in image_models.items()}
    seconds = interleave(image_steps, rounds, 1)
    figures["image_step_vs_trainable"] = _step_row(rows, "image tower", seconds, kinds)
    figures["image_step_peak_mib"] = _memory_row(rows, "image tower", image_steps, kinds)
    del image_models, image_steps
    models = {kind: make_clip(kind, ("visual", "text")).to(device) for kind in kinds}
    steps = {
        kind: few_shot_step(model, images, labels, prompts, whole_text=False)
        for kind, model in models.items()
    }
    seconds = interleave(steps, rounds, 1)
    figures["both_towers_step_vs_trainable"] = _step_row(rows, "both towers", seconds, kinds)
    figures["both_towers_peak_mib"] = _memory_row(rows, "both towers", steps, kinds)
    del models, steps
    attention = {"targets": ("q", "k", "v", "out"), "rank": 2}
    ours = make_clip("frozen", ())
    vlkr.add_adapters(ours, "lora", **attention)
    theirs = split_model(make_clip("frozen", ()), lambda base: DenseLoRALinear(base, 2), mlp=False)
    pair = {
        "vlkr lora": few_shot_step(ours.to(device), images, labels, prompts, whole_text=False),
        "clip-lora": few_shot_step(theirs.to(device), images, labels, prompts, whole_text=True),
    }
    losses = {name: step() for name, step in pair.items()}
    seconds = interleave(pair, rounds, 1)
    figures["clip_lora_over_ours"] = median_ratio(seconds, "clip-lora", "vlkr lora")
    figures["clip_lora_loss_difference"] = abs(losses["clip-lora"] - losses["vlkr lora"])
    rows.append(
        [
            "LoRA rank 2, q k v out, both towers, 100 classes",
            f"{1000 * statistics.median(seconds['vlkr lora']):.0f} (ours)",
            f"CLIP-LoRA's formulation {figures['clip_lora_over_ours']:.2f} x ours",
            f"loss differs by {figures['clip_lora_loss_difference']:.1e}",
        ]
        + [""] * (len(kinds) - 2)
    )
    return rows, figures


def _step_row(
    rows: list[list[str]], name: str, seconds: dict[str, list[float]], kinds: list[str]
) -> dict[str, float]:
    ratios = {kind: median_ratio(seconds, kind, "trainable") for kind in kinds}
    base = 1000 * statistics.median(seconds["trainable"])
    rows.append([name, f"{base:.0f}", *(f"{ratios[k]:.2f}" for k in kinds)])
    return ratios


def _memory_row(
    rows: list[list[str]], name: str, steps: dict[str, Callable[[], object]], kinds: list[str]
) -> dict[str, float]:
    peaks = peak_memory(steps)
    if peaks:
        rows.append([f"{name}, peak MiB", "", *(f"{peaks[k]:.0f}" for k in kinds)])
    return peaks


def bench_attention(rounds: int, device: str) -> tuple[list[list[str]], dict[str, object]]:
    """LoRA on a fused attention block of ViT-B/32: ours against peft's."""
    import peft

    x = torch.randn(32, 50, 768, device=device)
    candidates = {}
    kinds = {"ours": ["attn.qkv", "attn.out"], "ours split": ["attn.[qkv]", "attn.out"], "peft": []}
    for name, targets in kinds.items():
        torch.manual_seed(0)
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(768, 12, batch_first=True)})
        if targets:
            vlkr.add_adapters(model, "lora", targets=targets, rank=RANK)
        else:
            config = peft.LoraConfig(target_modules=["attn"], r=RANK)
            model = peft.get_peft_model(model, config)
        attention = model["attn"] if targets else model.base_model.model["attn"]
        candidates[name] = _attention_step(attention.to(device), x)
    seconds = interleave(candidates, rounds)
    ratio = median_ratio(seconds, "ours", "peft")
    split = median_ratio(seconds, "ours split", "peft")
    peft_ms = 1000 * statistics.median(seconds["peft"])
    rows = [
        ["attention with LoRA", "peft ms", "qkv, out / peft", "q, k, v, out / peft"],
        ["B/32, 32 x 50", f"{peft_ms:.1f}", f"{ratio:.2f}", f"{split:.2f}"],
    ]
    return rows, {"attention_ours_vs_peft": ratio, "attention_split_vs_peft": split}


def _attention_step(attention: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        attention.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        attention(leaf, leaf, leaf, need_weights=False)[0].sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-adapters"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", choices=["linear", "step", "attention"], default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = {
        "linear": (
            "Adapters on linear layers, forward + backward",
            lambda: bench_linears(args.rounds, device),
        ),
        "attention": ("LoRA on fused attention", lambda: bench_attention(args.rounds, device)),
        "step": (
            f"Training steps of ViT-B/32, batch {args.batch}",
            lambda: bench_steps(max(3, args.rounds // 2), device, args.batch),
        ),
    }
    for name, (title, run) in parts.items():
        if args.only in (None, name):
            write_report(title, *run(), args.output / name)


if __name__ == "__main__":
    main()
