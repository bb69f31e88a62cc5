"""CLIP in the terms of transformers: which models fit, weight names, and the tokenizer."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from vlkr.errors import VlkrError
from vlkr.export.formats import named_if_missing
from vlkr.files import write_text
from vlkr.models.clip import ClipBundle, clip_bpe, save_tokenizer

_NAMES = {
    "logit_scale": "logit_scale",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOKENS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def clip_mismatch(model: nn.Module) -> str | None:
    """Returns why open_clip's model cannot be a ``CLIPModel``; None if it can.

    :func:`convert_weights` finds out whether each weight has a place there.
    """
    kind, visual = type(model).__name__, getattr(model, "visual", None)
    text: Any = getattr(model, "text", model)
    if kind not in ("CLIP", "CustomTextCLIP"):
        return f"it is a {kind}"
    if not isinstance(visual, nn.Module) or type(visual).__name__ != "VisionTransformer":
        return f"its image tower is a {type(visual).__name__}, expected open_clip's own ViT"
    if not hasattr(text, "transformer") or not hasattr(text.transformer, "resblocks"):
        return f"its text tower is a {type(text).__name__}, expected open_clip's own transformer"
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    sizes: Any = (visual.image_size, visual.patch_size)
    checks = {
        "its image tower pools by attention": visual.attn_pool is not None,
        f"its image tower pools {visual.pool_type!r}, expected 'tok'": visual.pool_type != "tok",
        "its images or patches are not square": any(len(set(size)) > 1 for size in sizes),
        f"its text tower pools {pool!r}, expected 'argmax'": pool != "argmax",
        "its text tower is not causal": getattr(text, "attn_mask", None) is None,
    }
    transformers: Any = {"image": visual.transformer, "text": text.transformer}
    for tower, transformer in transformers.items():
        blocks = {type(block).__name__ for block in transformer.resblocks}
        activations = {type(block.mlp.gelu).__name__ for block in transformer.resblocks}
        checks |= {
            f"its {tower} tower has blocks {' '.join(sorted(blocks))}, expected "
            "ResidualAttentionBlock": blocks != {"ResidualAttentionBlock"},
            f"its {tower} tower has the activation {' '.join(sorted(activations))}, expected GELU "
            "or QuickGELU": not activations <= {"GELU", "QuickGELU"},
        }
    return next((mismatch for mismatch, applies in checks.items() if applies), None)


def convert_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames a state dict for ``CLIPModel``; splits fused in_proj, transposes projections."""
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        plain = key.removeprefix("text.")
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](\w+)", plain)
        prefix, module, kind = "", "", ""
        if block:
            tower = "vision_model" if block[1] else "text_model"
            prefix, module, kind = f"{tower}.encoder.layers.{block[2]}.", block[3], block[4]
        if module == "attn.in_proj":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{prefix}self_attn.{letter}_proj.{kind}"] = part
        elif module in _BLOCK:
            converted[f"{prefix}{_BLOCK[module]}.{kind}"] = tensor
        elif plain in _NAMES:
            is_transposed = plain in ("visual.proj", "text_projection")
            converted[_NAMES[plain]] = tensor.T if is_transposed else tensor
        else:
            raise VlkrError(f"it has no place for {key}")
    converted["logit_scale"] = converted["logit_scale"].reshape(())
    return {key: tensor.detach().contiguous() for key, tensor in converted.items()}


def clip_tokenizer(bundle: ClipBundle) -> Any:
    """Returns transformers' tokenizer with the same ids as open_clip's.

    Texts are not repaired first (mojibake, HTML entities), which open_clip does with ftfy.
    """
    vocabulary, merges = clip_bpe(bundle)
    ids = {_TOKENS.get(token, token): index for token, index in vocabulary.items()}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    with named_if_missing("CLIP's tokenizer"):
        transformers: Any = import_module("transformers")  # optional, and slow to import
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        return transformers.CLIPTokenizerFast.from_pretrained(
            folder, model_max_length=context_length(bundle)
        )


def context_length(bundle: ClipBundle) -> int:
    """Returns the number of tokens per text."""
    return int(bundle.tokenizer([""]).shape[1])


def write_tokenizer(bundle: ClipBundle, folder: Path) -> None:
    """Writes the tokenizer's own files, or CLIP's as ``tokenizer.json``, padded as in open_clip."""
    if save_tokenizer(bundle, folder):
        return
    tokenizer = clip_tokenizer(bundle).backend_tokenizer
    length = context_length(bundle)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token="!")
    write_text(folder / "tokenizer.json", tokenizer.to_str())
