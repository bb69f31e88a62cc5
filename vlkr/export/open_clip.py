"""An open_clip folder: ``open_clip_config.json``, ``open_clip_model.safetensors``, a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlkr.export.formats import Exported, ExportInput, Format, cast_tensors, require_text
from vlkr.models.clip import (
    encode_image,
    encode_text,
    load_clip,
    save_open_clip_folder,
    save_tokenizer,
)


class ExportedOpenClip(Exported):
    """An export run by open_clip."""

    def _load(self) -> None:
        self.bundle = load_clip(f"local-dir:{self.folder}")
        self.bundle.model.to(self.device)
        self.preprocess = self.bundle.preprocess

    def image_features(self, pixels: Tensor) -> Tensor:
        """Runs the image tower."""
        return encode_image(self.bundle.model, pixels)

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Runs the text tower on the ids of the folder's tokenizer."""
        return encode_text(self.bundle.model, self.bundle.tokenizer(list(texts)).to(self.device))


class OpenClipFormat(Format):
    """The whole model for open_clip."""

    library = "open_clip"
    snippet = """\
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
"""
    exported = ExportedOpenClip

    def __init__(self, source: ExportInput) -> None:
        super().__init__(source)
        require_text(source, "open_clip")

    def contents(self) -> str:
        """Returns a paragraph about model and tokenizer."""
        return (
            "The whole model with the adapter merged into its weights: `open_clip_config.json` "
            "(architecture and preprocessing) and `open_clip_model.safetensors`. The tokenizer is "
            "open_clip's default unless its files are beside them. open_clip computes in fp32, "
            "whatever the weights are stored in, unless it is given a `precision`."
        )

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the merged model."""
        tensors = cast_tensors(self.source.merged.state_dict(), dtype)
        save_open_clip_folder(self.source.adapted, folder, tensors)
        save_tokenizer(self.source.adapted, folder)
