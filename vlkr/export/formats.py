"""What every export format does, and the list of them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlkr.errors import VlkrError
from vlkr.export.preprocessing import Preprocessing
from vlkr.models.clip import ClipBundle

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

FORMATS = {
    "open_clip": "vlkr.export.open_clip",
    "timm": "vlkr.export.timm",
    "transformers": "vlkr.export.transformers",
    "onnx": "vlkr.export.onnx",
    "torch": "vlkr.export.torch",
    "adapter": "vlkr.export.adapter",
}


@dataclass(frozen=True)
class Classifier:
    """Class embeddings and what they were made from.

    Attributes:
        class_names: by label.
        templates: prompts with the placeholder ``{c}``.
        class_embeddings: ``(num_classes, embed_dim)``, unit norm, fp32.
        logit_scale: factor of the cosines.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    class_embeddings: Tensor
    logit_scale: float

    def logits(self, image_features: Tensor) -> Tensor:
        """``(batch, embed_dim)``, unit norm, to ``(batch, num_classes)``."""
        return self.logit_scale * image_features @ self.class_embeddings.T

    def to(self, device: torch.device) -> Classifier:
        """The same on another device."""
        moved = self.class_embeddings.to(device)
        return Classifier(self.class_names, self.templates, moved, self.logit_scale)


@dataclass(frozen=True)
class Subject:
    """An adapted model as it is handed to a format.

    Attributes:
        run: the run folder.
        config: the run's configuration.
        adapted: the model with its adapters on, at the strength that is exported.
        plain: a copy with the adapters merged in fp32: the base's classes and state-dict keys.
        preprocessing: of the images.
        classifier: of the run's classes.
        alpha: the strength of the adapters; 1 as they were trained, 0 is the base model.
    """

    run: Path
    config: dict[str, Any]
    adapted: ClipBundle
    plain: nn.Module
    preprocessing: Preprocessing
    classifier: Classifier
    alpha: float


class Predictor(ABC):
    """An exported model, loaded from its folder by the library that the format is made for.

    Args:
        classifier: of the folder.
        device: where to compute.
    """

    def __init__(self, classifier: Classifier, device: torch.device) -> None:
        self.classifier = classifier.to(device)
        self.device = device

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB image to ``(3, height, width)``, as the format's own settings tell."""

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` to unit norm ``(batch, embed_dim)``, fp32."""

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor | None:
        """Unit norm ``(num_texts, embed_dim)``, fp32; None from a format without a text encoder.

        Args:
            texts: for a format that has its own tokenizer.
            tokens: the same by the base model's tokenizer, for one that has none.
        """
        return None

    def logits(self, pixels: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` to ``(batch, num_classes)``, fp32."""
        return self.classifier.logits(self.image_features(pixels))


class Description(NamedTuple):
    """What a format makes of a model.

    Attributes:
        library: that loads it, as model hubs spell it.
        contents: what the files hold, a paragraph of Markdown.
        snippet: the lines that load it, with ``{folder}`` for its path.
    """

    library: str
    contents: str
    snippet: str


class Format(Protocol):
    """The module of a format."""

    def describe(self, subject: Subject) -> Description:
        """What the format makes of a model.

        Raises:
            VlkrError: for a model that it cannot hold.
        """
        ...

    def write(self, subject: Subject, folder: Path, dtype: torch.dtype) -> None:
        """Writes weights and preprocessing into an existing folder."""
        ...

    def load(
        self, folder: Path, manifest: dict[str, Any], classifier: Classifier, device: torch.device
    ) -> Predictor:
        """Reads such a folder."""
        ...


def get_format(name: str) -> Format:
    """The module of a format.

    Raises:
        VlkrError: for an unknown one, or one whose library is not installed.
    """
    if name not in FORMATS:
        raise VlkrError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    try:
        return cast(Format, importlib.import_module(FORMATS[name]))
    except ModuleNotFoundError as error:
        raise VlkrError(
            f"format {name} needs {error.name}, which is not installed: pip install 'vlkr[export]'"
        ) from error


def require_text(subject: Subject, format_name: str) -> None:
    """Raises :class:`VlkrError` for a model without a text tower."""
    if not subject.adapted.has_text:
        raise VlkrError(
            f"model {subject.adapted.name!r} has no text tower, and format {format_name} holds "
            "image-text models; choose timm, onnx, torch or adapter"
        )


def cast_tensors(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Casts weights, once, after they were merged; scalars and integers stay as they are."""
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() and tensor.numel() > 1 else tensor
        for key, tensor in tensors.items()
    }


def unit_norm(features: Tensor) -> Tensor:
    """Features in fp32 with norm 1."""
    return F.normalize(features.float(), dim=-1)
