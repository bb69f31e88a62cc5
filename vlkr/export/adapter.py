"""The adapter alone, in peft's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vlkr.adapters import LoRA, load_adapter, save_adapter
from vlkr.adapters.foreign import transformers_name
from vlkr.adapters.inject import Placed, placed_adapters
from vlkr.errors import VlkrError
from vlkr.export.formats import Classifier, Description, Predictor, Subject
from vlkr.export.naming import misfit
from vlkr.files import write_json
from vlkr.models.clip import encode_image, encode_text
from vlkr.models.loading import load_model

_PEFT_SNIPPET = """\
from peft import PeftModel
from transformers import CLIPModel
model = PeftModel.from_pretrained(CLIPModel.from_pretrained("base"), "{folder}")
"""
_VLKR_SNIPPET = """\
import vlkr  # and `model`, the base model by open_clip or timm
vlkr.load_adapter(model, "{folder}")
"""


def describe(subject: Subject) -> Description:
    """An adapter."""
    if _transformers_lora(subject) is None:
        return Description(
            "vlkr",
            "The adapter without the base model, in vlkr's own terms: `adapter_config.json` and "
            "`adapter_model.safetensors`. `vlkr.load_adapter` puts it onto the base model, whose "
            "weights must have the hash below.",
            _VLKR_SNIPPET,
        )
    return Description(
        "peft",
        "The adapter without the base model, as a LoRA that peft puts onto transformers' "
        "`CLIPModel` with the base's weights, and `vlkr.load_adapter` onto open_clip's model. "
        "`vlkr export --format transformers --alpha 0 --output base` writes the former.",
        _PEFT_SNIPPET,
    )


def write(subject: Subject, folder: Path, dtype: torch.dtype) -> None:
    """Writes factors and configuration."""
    lora = _transformers_lora(subject)
    if lora is None:
        label = subject.adapted.label
        save_adapter(subject.adapted.model, folder, base_model=label, dtype=dtype, force=True)
        return
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": factor.detach().to(dtype).contiguous()
        for name, factors in lora.items()
        for letter, factor in zip("AB", factors, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", _peft_config(subject, list(lora)))


def _transformers_lora(subject: Subject) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Factors A and B by the names of ``CLIPModel``'s linear layers, if all of them have one."""
    placed = placed_adapters(subject.adapted.model)
    if type(placed[0].adapter) is not LoRA or misfit(subject.plain) is not None:
        return None
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for key, a, b in (part for p in placed for part in _split(p)):
        name = transformers_name(key)
        if name is None:
            return None
        factors[name] = (a, b)
    return factors


def _split(placed: Placed) -> list[tuple[str, Tensor, Tensor]]:
    """Key and factors; those of a fused qkv as three that share A."""
    a, b = placed.adapter.get_parameter("lora_A"), placed.adapter.get_parameter("lora_B")
    if placed.name != "qkv":
        return [(placed.key, a, b)]
    parts = zip("qkv", b.chunk(3), strict=True)
    return [(f"{placed.module}.{letter}", a.clone(), part) for letter, part in parts]


def _peft_config(subject: Subject, names: list[str]) -> dict[str, Any]:
    """The fields of peft's ``LoraConfig`` that are not its defaults, or that a reader looks for."""
    adapter = placed_adapters(subject.adapted.model)[0].adapter
    assert isinstance(adapter, LoRA)
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": subject.adapted.label,
        "r": adapter.rank,
        "lora_alpha": subject.alpha * alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "bias": "none",
        "target_modules": names,
        "inference_mode": True,
    }


class AdapterPredictor(Predictor):
    """By vlkr, with the base model from where it came."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], classifier: Classifier, device: torch.device
    ) -> None:
        super().__init__(classifier, device)
        self.bundle = load_model(manifest["base_model"], manifest["base_pretrained"])
        if self.bundle.weights_hash != manifest["base_sha256"]:
            raise VlkrError(
                f"{folder} was made for another base: {manifest['base_model']!r} with weights "
                f"{manifest['base_sha256'][:12]}, found {self.bundle.weights_hash[:12]}"
            )
        load_adapter(self.bundle.model, folder)
        self.bundle.model.to(device).eval()

    def preprocess(self, image: Image.Image) -> Tensor:
        """The base model's."""
        return self.bundle.preprocess(image)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Of the adapted image tower."""
        return encode_image(self.bundle.model, pixels)

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Of the adapted text tower."""
        return encode_text(self.bundle.model, tokens.to(self.device))


def load(
    folder: Path, manifest: dict[str, Any], classifier: Classifier, device: torch.device
) -> AdapterPredictor:
    """Reads the folder, and the base model."""
    return AdapterPredictor(folder, manifest, classifier, device)
