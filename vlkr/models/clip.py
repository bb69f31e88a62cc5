"""CLIP models from open_clip; no other module of the package imports it."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import open_clip
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from vlkr.adapters.hosts import weights_hash
from vlkr.errors import VlkrError
from vlkr.models.classifier import ClassHead
from vlkr.models.names import model_source
from vlkr.runtime import quiet

_LOAD_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    ImportError,
    KeyError,
    SafetensorError,
    UnpicklingError,
)


@dataclass
class ClipBundle:
    """A CLIP model with its tokenizer and preprocessing.

    Attributes:
        model: the open_clip model, in eval mode, fp32.
        tokenizer: maps a list of texts to ``(num_texts, context_length)`` token ids.
        preprocess: maps a PIL image to ``(3, size, size)``, open_clip's evaluation transform.
        preprocess_cfg: size, mean, std, interpolation and resize mode of that transform.
        model_cfg: open_clip's configuration of the architecture, as built.
        name: name of the model, as the user gave it.
        pretrained: open_clip's tag, or the weights' path; None if the name is enough.
        weights_hash: SHA-256 of the weights as loaded.
        head: class embeddings of a model without text, once they are learned.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: Callable[[Image.Image], Tensor]
    preprocess_cfg: dict[str, Any]
    model_cfg: dict[str, Any]
    name: str
    pretrained: str | None
    weights_hash: str
    head: ClassHead | None = None

    @property
    def has_text(self) -> bool:
        """Whether the model has a text tower, which makes class names a classifier."""
        return hasattr(self.model, "encode_text")

    @property
    def label(self) -> str:
        """Name, tag and first digits of the hash, for captions."""
        tag = f"/{Path(self.pretrained).name}" if self.pretrained else ""
        return f"{self.name}{tag} (weights {self.weights_hash[:12]})"


def load_clip(name: str, pretrained: str | None = None) -> ClipBundle:
    """Loads a CLIP model.

    Args:
        name: ``"tiny"`` (the bundled model), an open_clip architecture such as ``"ViT-B-32"``,
            ``"hf-hub:org/repo"``, ``"local-dir:/path"``, or the path of a folder that holds
            ``open_clip_config.json``.
        pretrained: open_clip's tag or a path of weights; only needed for an architecture's name.

    Returns:
        The model in fp32 on the CPU, and what belongs to it.

    Raises:
        VlkrError: for an unknown model or tag, a missing path, or weights that do not fit.
    """
    source = model_source(name)
    _check_names(source, name, pretrained)
    schema = source.startswith(("local-dir:", "hf-hub:"))
    # openai's weights need QuickGELU, which the plain architecture names leave out.
    tag = {} if schema else open_clip.get_pretrained_cfg(source, pretrained or "")
    quick_gelu = bool((tag or {}).get("quick_gelu"))
    try:
        with _quiet():
            model, _, preprocess = open_clip.create_model_and_transforms(
                source, pretrained=pretrained, force_quick_gelu=quick_gelu
            )
            model_cfg = deepcopy(open_clip.get_model_config(source))
            tokenizer = open_clip.get_tokenizer(source)
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        weights = f" with weights {pretrained!r}" if pretrained else ""
        raise VlkrError(f"cannot load model {name!r}{weights}: {reason[:400]}") from error
    if quick_gelu:
        model_cfg["quick_gelu"] = True
    return ClipBundle(
        model=cast(nn.Module, model.eval()),
        tokenizer=tokenizer,
        preprocess=preprocess,
        preprocess_cfg=dict(model.visual.preprocess_cfg),
        model_cfg=model_cfg,
        name=name,
        pretrained=pretrained,
        weights_hash=weights_hash(model),
    )


def clip_shapes(name: str) -> nn.Module:
    """Returns the architecture of a CLIP model without its weights, on the meta device.

    Raises:
        VlkrError: if it is unknown, or known only to the hub.
    """
    source = model_source(name)
    if source.startswith("hf-hub:"):
        raise VlkrError(f"the architecture of {name!r} is on the hub")
    if not source.startswith("local-dir:") and source not in open_clip.list_models():
        raise VlkrError(f"unknown model {name!r}; see open_clip.list_models()")
    try:
        with _quiet(), torch.device("meta"):
            model = open_clip.create_model(
                source, load_weights=False, pretrained_text=False, device="meta"
            )
    except _LOAD_ERRORS as error:
        raise VlkrError(f"cannot read the architecture of {name!r}: {error}") from error
    return cast(nn.Module, model)


def _check_names(source: str, name: str, pretrained: str | None) -> None:
    if source.startswith("local-dir:"):
        folder = Path(source.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise VlkrError(f"no open_clip model at {folder}: open_clip_config.json is missing")
        if not list(folder.glob("*.safetensors")) + list(folder.glob("*.bin")):
            raise VlkrError(f"no weights in {folder}, expected open_clip_model.safetensors")
    elif source.startswith("hf-hub:"):
        return
    elif source not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see open_clip.list_models()"
        raise VlkrError(
            f"unknown model {name!r}; {hint} (or 'tiny', 'hf-hub:ORG/REPO', 'local-dir:PATH')"
        )
    elif pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(source)
        raise VlkrError(
            f"model {name!r} needs its weights named by --pretrained: a path, or one of "
            f"{', '.join(tags) or '(no tags)'}"
        )
    elif not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(source)
        if pretrained not in tags:
            raise VlkrError(
                f"pretrained {pretrained!r} is neither a file nor a tag of {name}; tags: "
                f"{', '.join(tags) or '(none)'}"
            )
    if source.startswith("local-dir:") and pretrained is not None:
        raise VlkrError(f"model {name!r} brings its weights, drop --pretrained {pretrained!r}")


def _quiet() -> AbstractContextManager[None]:
    """Silences what open_clip writes to the root logger, and the hub's log."""
    return quiet("", "huggingface_hub", level=logging.CRITICAL, ignore=["QuickGELU mismatch"])


def save_open_clip_folder(bundle: ClipBundle, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes ``open_clip_config.json`` and ``open_clip_model.safetensors`` into ``folder``.

    Args:
        bundle: its architecture and preprocessing are written.
        folder: an existing folder.
        tensors: the state dict, by open_clip's keys.
    """
    cfg = bundle.preprocess_cfg
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    config = {
        "model_cfg": bundle.model_cfg,
        "preprocess_cfg": {key: cfg[key] for key in keys if key in cfg},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(
        plain, folder / "open_clip_model.safetensors", metadata={"format": "pt"}
    )


def save_tokenizer(bundle: ClipBundle, folder: Path) -> bool:
    """Writes the tokenizer's files, unless it is the one that comes with open_clip.

    Returns:
        Whether there were files to write.
    """
    if not isinstance(bundle.tokenizer, open_clip.tokenizer.HFTokenizer):
        return False
    bundle.tokenizer.save_pretrained(folder)
    return True


def clip_bpe(bundle: ClipBundle) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns vocabulary and ordered merges of CLIP's own byte-pair encoding.

    Raises:
        VlkrError: if the model has a different tokenizer.
    """
    tokenizer = bundle.tokenizer
    plain = open_clip.SimpleTokenizer(context_length=getattr(tokenizer, "context_length", None))
    same = type(tokenizer) is type(plain) and all(
        getattr(tokenizer, name) == getattr(plain, name)
        for name in ("encoder", "bpe_ranks", "clean_fn", "reduction_fn")
    )
    if not same:
        kind = type(tokenizer).__name__
        raise VlkrError(f"model {bundle.name!r} does not have CLIP's own tokenizer but a {kind}")
    return plain.encoder, list(plain.bpe_ranks)


def evaluation_transform(preprocess_cfg: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Returns open_clip's evaluation transform, PIL image to ``(3, height, width)``."""
    cfg = open_clip.transform.PreprocessCfg(**preprocess_cfg)
    transform: Callable[[Image.Image], Tensor] = open_clip.transform.image_transform_v2(
        cfg, is_train=False
    )
    return transform


def hub_repository(name: str, pretrained: str | None) -> str | None:
    """Returns the ``org/repo`` of a model's weights on the hub, None for local weights.

    Args:
        name: as :func:`load_clip` takes it.
        pretrained: likewise.
    """
    source = model_source(name)
    if source.startswith("hf-hub:"):
        return source.removeprefix("hf-hub:").partition("@")[0]
    if source.startswith("local-dir:") or pretrained is None:
        return None
    cfg = open_clip.get_pretrained_cfg(source, pretrained)
    return "/".join(str(cfg.get("hf_hub", "")).split("/")[:2]) or None


def image_size(bundle: ClipBundle) -> tuple[int, int]:
    """Returns height and width of the images that the model takes."""
    size = bundle.preprocess_cfg["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Maps images ``(batch, 3, height, width)`` to normalized features ``(batch, embed_dim)``."""
    features: Tensor = model.encode_image(images, normalize=True)  # type: ignore[operator]
    return features


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Maps tokens ``(texts, context_length)`` to normalized features ``(texts, embed_dim)``."""
    length = _seen_length(model, tokens)
    tower = model if length == tokens.shape[1] else _shortened(model, length)
    features: Tensor = tower.encode_text(  # type: ignore[operator]
        tokens[:, :length], normalize=True
    )
    return features


def _text_owner(model: nn.Module) -> nn.Module:
    """Returns the module that holds the text tower's positions and mask."""
    text = getattr(model, "text", None)
    return text if isinstance(text, nn.Module) else model


def _seen_length(model: nn.Module, tokens: Tensor) -> int:
    """Returns how many tokens the text features depend on.

    In a causal tower that pools at the end token, the padding after it has no effect and can be
    cut off exactly; other towers see all of it.
    """
    owner = _text_owner(model)
    pool = getattr(owner, "text_pool_type", getattr(owner, "pool_type", None))
    causal = isinstance(getattr(owner, "attn_mask", None), Tensor)
    sees_padding = getattr(owner, "use_pad_mask", False) or getattr(owner, "cls_emb", None)
    if pool != "argmax" or not causal or (sees_padding is not None and sees_padding is not False):
        return tokens.shape[1]
    return int(tokens.argmax(dim=1).max()) + 1


def _shortened(model: nn.Module, length: int) -> nn.Module:
    """Returns a shallow copy whose text tower has ``length`` positions; the model is untouched."""
    owner = _text_owner(model)
    part = copy(owner)
    positions, mask = owner._parameters["positional_embedding"], owner._buffers["attn_mask"]
    assert positions is not None
    assert mask is not None
    part._parameters = {**owner._parameters, "positional_embedding": positions[:length]}  # type: ignore[dict-item]
    part._buffers = {**owner._buffers, "attn_mask": mask[:length, :length]}
    if owner is model:
        return part
    whole = copy(model)
    whole._modules = {**model._modules, "text": part}
    return whole


def logit_scale(model: nn.Module) -> Tensor:
    """Returns the scale of the cosine similarities, ``exp`` of the stored logarithm; a scalar."""
    scale: Tensor = model.logit_scale  # type: ignore[assignment]
    return scale.exp().squeeze()
