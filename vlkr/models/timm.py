"""Image encoders without text from timm; no other module of the package imports it."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from vlkr.adapters.hosts import weights_hash
from vlkr.errors import VlkrError
from vlkr.models.clip import ClipBundle

PREFIX = "timm:"
# CLIP's initial value (Radford et al., 2021, section 2.5).
_LOGIT_SCALE = math.log(1 / 0.07)
_RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


class ImageEncoder(nn.Module):
    """A timm model in place of CLIP's image tower.

    Args:
        visual: maps images to pooled features ``(batch, num_features)``.

    Attributes:
        logit_scale: natural logarithm of the factor of the cosine similarities.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(_LOGIT_SCALE))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Maps ``(batch, 3, height, width)`` to ``(batch, num_features)``."""
        features: Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features


def load_vit(name: str, pretrained: str | None = None) -> ClipBundle:
    """Loads the image encoder of a timm model, without its classifier.

    Args:
        name: ``"timm:"`` and timm's name, such as ``"timm:vit_base_patch16_224.augreg_in21k"``,
            ``"timm:hf-hub:org/repo"`` or ``"timm:local-dir:/path"``.
        pretrained: a path of weights; timm's own (from the hub or the folder) if there is none.

    Returns:
        A bundle without a text tower. Its classes are learned from images, see
        :class:`~vlkr.models.classifier.ClassHead`.

    Raises:
        VlkrError: for an unknown name, or weights that are not available or do not fit.
    """
    own = name.removeprefix(PREFIX)
    _check_names(own, pretrained)
    source = {} if pretrained is None else {"file": pretrained}
    try:
        visual = timm.create_model(
            own, pretrained=True, num_classes=0, pretrained_cfg_overlay=source or None
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        reason = " ".join(str(error).split())
        weights = f" with weights {pretrained!r}" if pretrained else ""
        raise VlkrError(f"cannot load model {name!r}{weights}: {reason[:400]}") from error
    config = timm.data.resolve_model_data_config(visual)
    model = ImageEncoder(visual).eval()
    return ClipBundle(
        model=model,
        tokenizer=_no_tokenizer,
        preprocess=timm.data.create_transform(**config, is_training=False),
        preprocess_cfg=_preprocess_cfg(config),
        model_cfg={"timm_model_name": own, "embed_dim": visual.num_features},
        name=name,
        pretrained=pretrained,
        weights_hash=weights_hash(model),
    )


def _no_tokenizer(texts: list[str]) -> Tensor:
    raise VlkrError(
        "a model without text has no classes before it is adapted: there is no zero-shot accuracy"
    )


def vit_shapes(name: str) -> nn.Module:
    """Returns the architecture of a timm model without its weights, on the meta device.

    Raises:
        VlkrError: if it is unknown, or known only to a folder or the hub.
    """
    own = name.removeprefix(PREFIX)
    _check_names(own, None)
    if ":" in own:
        raise VlkrError(f"the architecture of {name!r} is only known with its weights")
    with torch.device("meta"):
        return ImageEncoder(timm.create_model(own, pretrained=False, num_classes=0))


def _preprocess_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """Returns timm's data configuration by open_clip's names, with timm's crop."""
    return {
        "size": tuple(config["input_size"][1:]),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "resize_mode": _RESIZE_MODES[config["crop_mode"]],
        "crop_pct": config["crop_pct"],
    }


def _check_names(own: str, pretrained: str | None) -> None:
    if own.startswith("local-dir:"):
        folder = Path(own.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise VlkrError(f"no timm model at {folder}: config.json is missing")
    elif not own.startswith("hf-hub:") and not timm.is_model(own):
        near = difflib.get_close_matches(own, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise VlkrError(f"unknown timm model {own!r}; {hint}")
    if pretrained is not None and not Path(pretrained).is_file():
        raise VlkrError(
            f"pretrained {pretrained!r} is not a file; a timm tag goes into the name, as in "
            f"{PREFIX}{own.split('.')[0]}.TAG"
        )
