"""A timm model: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkr.errors import VlkrError
from vlkr.export.formats import Exported, ExportInput, Format, cast_tensors, unit_norm
from vlkr.files import write_json

_UNWANTED = ("architecture", "url", "file", "state_dict", "source", "hf_hub_id", "label_names")


class ExportedTimm(Exported):
    """An export run by timm."""

    def _load(self) -> None:
        self.model: Any = timm.create_model(f"local-dir:{self.folder}", pretrained=True)
        self.model.to(self.device).eval()
        config = timm.data.resolve_model_data_config(self.model)
        self.preprocess = timm.data.create_transform(**config, is_training=False)
        self.has_classes = "label_names" in json.loads((self.folder / "config.json").read_text())

    def image_features(self, pixels: Tensor) -> Tensor:
        """Returns the model's output, or the input of its classifier."""
        features = self.model.forward_features(pixels)
        return unit_norm(self.model.forward_head(features, pre_logits=self.has_classes))

    def logits(self, pixels: Tensor) -> Tensor:
        """Runs the model's own classifier if it has one."""
        if not self.has_classes:
            return super().logits(pixels)
        hidden = self.model.forward_features(pixels)
        norm = self.model.forward_head(hidden, pre_logits=True).norm(dim=-1, keepdim=True)
        logits: Tensor = self.classifier.logit_scale * self.model.forward_head(hidden) / norm
        return logits


class TimmFormat(Format):
    """The image tower for timm."""

    library = "timm"
    snippet = """\
import timm
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
"""
    exported = ExportedTimm

    def __init__(self, source: ExportInput) -> None:
        super().__init__(source)
        self.preprocess_config = source.preprocessing.timm()
        self.trunk, self.projection = _tower(source)
        self.architecture = self.trunk.pretrained_cfg["architecture"]

    def contents(self) -> str:
        """Returns a paragraph about the model and its head."""
        scale = f"{self.source.classifier.logit_scale:.4f}"
        if not self.source.adapted.has_text:
            return (
                f"timm's `{self.architecture}` with the adapter merged into its weights and the "
                "class embeddings as its classifier: `model(pixels).argmax(1)` is the adapted "
                "model's class. The adapted model is a cosine classifier, which a linear one "
                "cannot express: its logits are these, divided by the norm of the features and "
                f"multiplied by {scale}. With `num_classes=0` the model returns the features."
            )
        projection = "the projection to image features as its head"
        head = "no head" if self.projection is None else projection
        return (
            f"The image tower, timm's `{self.architecture}`, with the adapter merged into its "
            f"weights and {head}: `model(pixels)` are image features before normalization. A "
            f"class's logit is the cosine of these and its embedding, multiplied by {scale}."
        )

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the image tower."""
        names: tuple[str, ...] = ()
        weight, bias = None, None
        if not self.source.adapted.has_text:
            names = self.source.classifier.class_names
            weight = self.source.classifier.class_embeddings
        elif self.projection is not None:
            weight, bias = self.projection.weight, self.projection.bias
        args = _arguments(self.trunk)
        num_classes = self.trunk.num_classes if weight is None else len(weight)
        try:
            model = timm.create_model(self.architecture, num_classes=num_classes, **args)
            state = self.trunk.state_dict()
            if weight is not None:
                head = model.get_classifier()
                (name,) = (name for name, module in model.named_modules() if module is head)
                state[f"{name}.weight"] = weight
                state[f"{name}.bias"] = torch.zeros(len(weight)) if bias is None else bias
            model.load_state_dict(state)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise VlkrError(
                f"timm cannot build {self.architecture!r} with these settings: {reason}"
            ) from error
        pretrained = {**self.trunk.pretrained_cfg, **self.preprocess_config}
        config = {
            "architecture": self.architecture,
            "num_classes": num_classes,
            "num_features": model.num_features,
            "model_args": args,
            "pretrained_cfg": {
                key: value
                for key, value in pretrained.items()
                if value is not None and key not in _UNWANTED
            }
            | {"num_classes": num_classes, "custom_load": False},
        } | ({"label_names": list(names)} if names else {})
        write_json(folder / "config.json", config)
        tensors = cast_tensors(model.state_dict(), dtype)
        plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def _tower(source: ExportInput) -> tuple[Any, nn.Linear | None]:
    """Returns the timm model inside the image tower, and the linear projection after it."""
    name = source.adapted.name
    visual: Any = source.merged.visual
    if not source.adapted.has_text:
        return visual, None
    trunk, head = getattr(visual, "trunk", None), getattr(visual, "head", None)
    if trunk is None or not isinstance(head, nn.Sequential):
        raise VlkrError(
            f"the image tower of {name!r} is a {type(visual).__name__}, not a timm model; choose "
            "another format"
        )
    layers = [layer for layer in head if not isinstance(layer, nn.Dropout)]
    if not layers:
        return trunk, None
    if len(layers) > 1 or not isinstance(layers[0], nn.Linear):
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise VlkrError(
            f"the image tower of {name!r} ends in {kinds}, and timm's head holds one linear "
            "layer; choose another format"
        )
    return trunk, layers[0]


def _arguments(trunk: Any) -> dict[str, Any]:
    """Returns what distinguishes the model from timm's default of the same name."""
    args: dict[str, Any] = {}
    if isinstance(pool := getattr(trunk, "global_pool", None), str):
        args["global_pool"] = pool
    if isinstance(norm := getattr(trunk, "fc_norm", None), nn.Module):
        # EVA and BEiT do not name this option as ViT does.
        known = inspect.signature(type(trunk)).parameters
        name = "use_fc_norm" if "use_fc_norm" in known else "fc_norm"
        args[name] = not isinstance(norm, nn.Identity)
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != tuple(trunk.pretrained_cfg["input_size"][1:]):
        args["img_size"] = list(size)
    return args
