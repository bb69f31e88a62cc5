"""A timm model: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkr.errors import VlkrError
from vlkr.export.formats import Classifier, Description, Predictor, Subject, cast_tensors, unit_norm

_SNIPPET = """\
import timm
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
"""


def describe(subject: Subject) -> Description:
    """An image encoder."""
    subject.preprocessing.timm()
    trunk, projection = _tower(subject)
    architecture = trunk.pretrained_cfg["architecture"]
    if not subject.adapted.has_text:
        contents = (
            f"timm's `{architecture}` with the adapter merged into its weights and the class "
            "embeddings as its classifier: `model(pixels).argmax(1)` is the adapted model's class. "
            "The adapted model is a cosine classifier, which a linear one cannot express: its "
            "logits are these, divided by the norm of the features and multiplied by "
            f"{subject.classifier.logit_scale:.4f}. With `num_classes=0` the model gives the "
            "features."
        )
        return Description("timm", contents, _SNIPPET)
    head = "no head" if projection is None else "the projection to image features as its head"
    contents = (
        f"The image tower, timm's `{architecture}`, with the adapter merged into its weights and "
        f"{head}: `model(pixels)` are image features, before they are normalised. For the logits "
        f"of a class multiply their cosine with its embedding by "
        f"{subject.classifier.logit_scale:.4f}."
    )
    return Description("timm", contents, _SNIPPET)


def write(subject: Subject, folder: Path, dtype: torch.dtype) -> None:
    """Writes the image tower."""
    trunk, projection = _tower(subject)
    names: tuple[str, ...] = ()
    weight, bias = None, None
    if not subject.adapted.has_text:
        names = subject.classifier.class_names
        weight = subject.classifier.class_embeddings
    elif projection is not None:
        weight, bias = projection.weight, projection.bias
    args = _arguments(trunk)
    architecture = trunk.pretrained_cfg["architecture"]
    num_classes = trunk.num_classes if weight is None else len(weight)
    try:
        model = timm.create_model(architecture, num_classes=num_classes, **args)
        state = trunk.state_dict()
        if weight is not None:
            head = model.get_classifier()
            (name,) = (name for name, module in model.named_modules() if module is head)
            state[f"{name}.weight"] = weight
            state[f"{name}.bias"] = torch.zeros(len(weight)) if bias is None else bias
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise VlkrError(f"timm cannot build {architecture!r} as it is here: {reason}") from error
    pretrained = {**trunk.pretrained_cfg, **subject.preprocessing.timm()}
    unwanted = ("architecture", "url", "file", "state_dict", "source", "hf_hub_id", "label_names")
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": model.num_features,
        "model_args": args,
        "pretrained_cfg": {
            key: value
            for key, value in pretrained.items()
            if value is not None and key not in unwanted
        }
        | {"num_classes": num_classes, "custom_load": False},
    } | ({"label_names": list(names)} if names else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = cast_tensors(model.state_dict(), dtype)
    plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def _tower(subject: Subject) -> tuple[Any, nn.Linear | None]:
    """The timm model inside the image tower, and the projection behind it.

    Raises:
        VlkrError: if there is no timm model, or more behind it than a linear projection.
    """
    name = subject.adapted.name
    visual: Any = subject.plain.visual
    if not subject.adapted.has_text:
        return visual, None
    trunk, head = getattr(visual, "trunk", None), getattr(visual, "head", None)
    if trunk is None or not isinstance(head, nn.Sequential):
        raise VlkrError(
            f"the image tower of {name!r} is a {type(visual).__name__} and no timm model; choose "
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
    """What distinguishes the model from timm's default of the same name."""
    args: dict[str, Any] = {}
    if isinstance(pool := getattr(trunk, "global_pool", None), str):
        args["global_pool"] = pool
    if isinstance(norm := getattr(trunk, "fc_norm", None), nn.Module):
        # EVA and BEiT name the option otherwise than ViT.
        known = inspect.signature(type(trunk)).parameters
        name = "use_fc_norm" if "use_fc_norm" in known else "fc_norm"
        args[name] = not isinstance(norm, nn.Identity)
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != tuple(trunk.pretrained_cfg["input_size"][1:]):
        args["img_size"] = list(size)
    return args


class TimmPredictor(Predictor):
    """By timm."""

    def __init__(self, folder: Path, classifier: Classifier, device: torch.device) -> None:
        super().__init__(classifier, device)
        self.model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
        self.model.to(device).eval()
        config = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**config, is_training=False)
        self.has_classes = "label_names" in json.loads((folder / "config.json").read_text())

    def preprocess(self, image: Image.Image) -> Tensor:
        """By ``pretrained_cfg``."""
        pixels: Tensor = self.transform(image)
        return pixels

    def image_features(self, pixels: Tensor) -> Tensor:
        """What comes out of the model, or in front of its classifier."""
        features = self.model.forward_features(pixels)
        return unit_norm(self.model.forward_head(features, pre_logits=self.has_classes))

    def logits(self, pixels: Tensor) -> Tensor:
        """Of the model's own classifier if it has one."""
        if not self.has_classes:
            return super().logits(pixels)
        hidden = self.model.forward_features(pixels)
        norm = self.model.forward_head(hidden, pre_logits=True).norm(dim=-1, keepdim=True)
        logits: Tensor = self.classifier.logit_scale * self.model.forward_head(hidden) / norm
        return logits


def load(
    folder: Path, manifest: dict[str, Any], classifier: Classifier, device: torch.device
) -> TimmPredictor:
    """Reads the folder."""
    return TimmPredictor(folder, classifier, device)
