"""The adapter alone, in peft's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlkr.adapters import LoRA, load_adapter, save_adapter
from vlkr.adapters.inject import InjectedAdapter, injected_adapters
from vlkr.adapters.targets import transformers_name
from vlkr.errors import VlkrError
from vlkr.export.formats import Exported, ExportInput, Format
from vlkr.export.hf_clip import clip_mismatch
from vlkr.files import write_json
from vlkr.models.clip import encode_image, encode_text
from vlkr.models.loading import load_model

_PEFT_SNIPPET = """\
from peft import PeftModel
from transformers import CLIPModel
model = PeftModel.from_pretrained(CLIPModel.from_pretrained("base"), "{folder}")
"""


class ExportedAdapter(Exported):
    """An export run by vlkr, with the base model from its original location."""

    def _load(self) -> None:
        manifest = self.manifest
        self.bundle = load_model(manifest.base_model, manifest.base_pretrained)
        if self.bundle.weights_hash != manifest.base_sha256:
            raise VlkrError(
                f"{self.folder} was made for a different base: {manifest.base_model!r} with "
                f"weights {manifest.base_sha256[:12]}, got {self.bundle.weights_hash[:12]}"
            )
        load_adapter(self.bundle.model, self.folder)
        self.bundle.model.to(self.device).eval()
        self.preprocess = self.bundle.preprocess

    def image_features(self, pixels: Tensor) -> Tensor:
        """Runs the adapted image tower."""
        return encode_image(self.bundle.model, pixels)

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Runs the adapted text tower."""
        return encode_text(self.bundle.model, tokens.to(self.device))


class AdapterFormat(Format):
    """The adapter without the base model, for peft if it is a LoRA of a model peft can load."""

    library = "vlkr"
    snippet = """\
import vlkr  # and `model`, the base model by open_clip or timm
vlkr.load_adapter(model, "{folder}")
"""
    exported = ExportedAdapter

    def __init__(self, source: ExportInput) -> None:
        super().__init__(source)
        self.lora = _transformers_lora(source)
        if self.lora is not None:
            self.library, self.snippet = "peft", _PEFT_SNIPPET

    def contents(self) -> str:
        """Returns a paragraph about factors and configuration."""
        if self.lora is None:
            return (
                "The adapter without the base model, in vlkr's own terms: `adapter_config.json` "
                "and `adapter_model.safetensors`. `vlkr.load_adapter` injects it into the base "
                "model, whose weights must have the hash below."
            )
        return (
            "The adapter without the base model, as a LoRA that peft injects into transformers' "
            "`CLIPModel` with the base's weights, and `vlkr.load_adapter` into open_clip's model. "
            "`vlkr export --format transformers --alpha 0 --output base` writes the former."
        )

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes factors and configuration."""
        adapted = self.source.adapted
        if self.lora is None:
            save_adapter(adapted.model, folder, base_model=adapted.label, dtype=dtype, force=True)
            return
        tensors = {
            f"base_model.model.{name}.lora_{letter}.weight": factor.detach().to(dtype).contiguous()
            for name, factors in self.lora.items()
            for letter, factor in zip("AB", factors, strict=True)
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", _peft_config(self.source, list(self.lora)))


def _transformers_lora(source: ExportInput) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Returns factors A and B by the names of ``CLIPModel``'s linear layers, if all have one."""
    placed = injected_adapters(source.adapted.model)
    if type(placed[0].adapter) is not LoRA or clip_mismatch(source.merged) is not None:
        return None
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for key, a, b in (part for p in placed for part in _split(p)):
        name = transformers_name(key)
        if name is None:
            return None
        factors[name] = (a, b)
    return factors


def _split(placed: InjectedAdapter) -> list[tuple[str, Tensor, Tensor]]:
    """Returns key and factors; those of a fused qkv as three that share A."""
    a, b = placed.adapter.get_parameter("lora_A"), placed.adapter.get_parameter("lora_B")
    if placed.name != "qkv":
        return [(placed.key, a, b)]
    parts = zip("qkv", b.chunk(3), strict=True)
    return [(f"{placed.module}.{letter}", a.clone(), part) for letter, part in parts]


def _peft_config(source: ExportInput, names: list[str]) -> dict[str, Any]:
    """Returns the fields of peft's ``LoraConfig`` that differ from its defaults or identify it."""
    adapter = injected_adapters(source.adapted.model)[0].adapter
    assert isinstance(adapter, LoRA)
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": source.adapted.label,
        "r": adapter.rank,
        "lora_alpha": source.alpha * alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "bias": "none",
        "target_modules": names,
        "inference_mode": True,
    }
