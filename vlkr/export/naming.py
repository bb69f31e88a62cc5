"""open_clip's weights by the names of transformers' ``CLIPModel``."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from vlkr.errors import VlkrError

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


def misfit(model: nn.Module) -> str | None:
    """Why open_clip's model is none that ``CLIPModel`` can be; None if it is one.

    Whether there is a place for each weight :func:`convert` finds out.
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
    return next((what for what, wrong in checks.items() if wrong), None)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by transformers' names; fused in_proj is split, projections are transposed.

    Raises:
        VlkrError: naming a weight that has no place there.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        plain = key.removeprefix("text.")
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](\w+)", plain)
        prefix, module, kind = "", "", ""
        if block:
            tower = "vision_model" if block[1] else "text_model"
            prefix, module, kind = f"{tower}.encoder.layers.{block[2]}.", block[3], block[4]
        if module == "attn.in_proj":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{prefix}self_attn.{letter}_proj.{kind}"] = part
        elif module in _BLOCK:
            found[f"{prefix}{_BLOCK[module]}.{kind}"] = tensor
        elif plain in _NAMES:
            transposed = plain in ("visual.proj", "text_projection")
            found[_NAMES[plain]] = tensor.T if transposed else tensor
        else:
            raise VlkrError(f"it has no place for {key}")
    found["logit_scale"] = found["logit_scale"].reshape(())
    return {key: tensor.detach().contiguous() for key, tensor in found.items()}
