"""An open_clip folder: ``open_clip_config.json``, ``open_clip_model.safetensors``, a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlkr.export.formats import (
    Classifier,
    Description,
    Predictor,
    Subject,
    cast_tensors,
    require_text,
)
from vlkr.models.clip import (
    encode_image,
    encode_text,
    load_clip,
    save_open_clip_folder,
    save_tokenizer,
)

_SNIPPET = """\
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
"""


def describe(subject: Subject) -> Description:
    """An image-text model."""
    require_text(subject, "open_clip")
    return Description(
        "open_clip",
        "The whole model with the adapter merged into its weights: `open_clip_config.json` "
        "(architecture and preprocessing) and `open_clip_model.safetensors`. The tokenizer is "
        "open_clip's default unless its files lie beside them. open_clip computes in fp32, "
        "whatever the weights are stored in, unless it is given a `precision`.",
        _SNIPPET,
    )


def write(subject: Subject, folder: Path, dtype: torch.dtype) -> None:
    """Writes the merged model."""
    save_open_clip_folder(subject.adapted, folder, cast_tensors(subject.plain.state_dict(), dtype))
    save_tokenizer(subject.adapted, folder)


class OpenClipPredictor(Predictor):
    """By open_clip."""

    def __init__(self, folder: Path, classifier: Classifier, device: torch.device) -> None:
        super().__init__(classifier, device)
        self.bundle = load_clip(f"local-dir:{folder}")
        self.bundle.model.to(device)

    def preprocess(self, image: Image.Image) -> Tensor:
        """By ``preprocess_cfg``."""
        return self.bundle.preprocess(image)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Of the image tower."""
        return encode_image(self.bundle.model, pixels)

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Of the text tower, by the folder's tokenizer."""
        return encode_text(self.bundle.model, self.bundle.tokenizer(list(texts)).to(self.device))


def load(
    folder: Path, manifest: dict[str, Any], classifier: Classifier, device: torch.device
) -> OpenClipPredictor:
    """Reads the folder."""
    return OpenClipPredictor(folder, classifier, device)
