"""transformers' ``CLIPModel`` with its image processor and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from vlkr.errors import VlkrError
from vlkr.export.formats import (
    Classifier,
    Description,
    Predictor,
    Subject,
    require_text,
    unit_norm,
)
from vlkr.export.naming import convert, misfit
from vlkr.export.tokenizer import clip_tokenizer, context_length
from vlkr.models.clip import clip_bpe

_SNIPPET = """\
from transformers import AutoProcessor, CLIPModel
model = CLIPModel.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
"""
_hf: Any = transformers  # whose types differ from version to version
_ACTIVATIONS = {"QuickGELU": "quick_gelu", "none": "gelu", "tanh": "gelu_pytorch_tanh"}
_START_OF_TEXT, _END_OF_TEXT = 49406, 49407


def describe(subject: Subject) -> Description:
    """An image-text model; builds it to see whether it fits."""
    require_text(subject, "transformers")
    _build(subject)
    return Description(
        "transformers",
        "The whole model with the adapter merged into its weights, as transformers' `CLIPModel` "
        "(`config.json`, `model.safetensors`), `CLIPImageProcessor` (`preprocessor_config.json`) "
        "and `CLIPTokenizer`. transformers computes in the dtype that it loads the weights in. "
        "Its tokenizer does not mend texts (mojibake, HTML entities) as open_clip's does.",
        _SNIPPET,
    )


def write(subject: Subject, folder: Path, dtype: torch.dtype) -> None:
    """Writes model, processor and tokenizer."""
    with _quiet():
        _build(subject).to(dtype).save_pretrained(folder)
    _hf.CLIPImageProcessor(**subject.preprocessing.transformers()).save_pretrained(folder)
    clip_tokenizer(subject.adapted).save_pretrained(folder)


def _build(subject: Subject) -> Any:
    """The model with its weights in their places.

    Raises:
        VlkrError: naming what has no place.
    """
    model = subject.plain
    subject.preprocessing.transformers()
    try:
        if reason := misfit(model):
            raise VlkrError(reason)
        clip_bpe(subject.adapted)
        state = convert(model.state_dict())
        with torch.device("meta"):  # nothing is initialised that is replaced at once
            built = _hf.CLIPModel(_config(subject, state))
        built.load_state_dict(state, assign=True)
    except (VlkrError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise VlkrError(
            f"model {subject.adapted.name!r} does not fit transformers' CLIPModel: {reason}; "
            "choose another format"
        ) from error
    return built


def _config(subject: Subject, state: dict[str, Tensor]) -> Any:
    visual: Any = subject.plain.visual
    text: Any = getattr(subject.plain, "text", subject.plain)
    projection_dim = state["visual_projection.weight"].shape[0]
    return _hf.CLIPConfig(
        projection_dim=projection_dim,
        logit_scale_init_value=state["logit_scale"].item(),
        vision_config={
            **_encoder_config(visual.transformer, visual.ln_post),
            "projection_dim": projection_dim,
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
        },
        text_config={
            **_encoder_config(text.transformer, text.ln_final),
            "projection_dim": projection_dim,
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": context_length(subject.adapted),
            "bos_token_id": _START_OF_TEXT,
            "eos_token_id": _END_OF_TEXT,
            "pad_token_id": _END_OF_TEXT,
        },
    )


def _encoder_config(transformer: Any, norm: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    activation = getattr(block.mlp.gelu, "approximate", "QuickGELU")
    return {
        "hidden_size": block.mlp.c_fc.in_features,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _ACTIVATIONS[activation],
        "layer_norm_eps": norm.eps,
    }


class TransformersPredictor(Predictor):
    """By transformers."""

    def __init__(self, folder: Path, classifier: Classifier, device: torch.device) -> None:
        super().__init__(classifier, device)
        with _quiet():
            self.model = _hf.CLIPModel.from_pretrained(folder).to(device).eval()
        # The one that resizes with Pillow, as the model was trained, has had both names.
        processor = getattr(_hf, "CLIPImageProcessorPil", _hf.CLIPImageProcessor)
        self.processor = processor.from_pretrained(folder)
        self.tokenizer = _hf.CLIPTokenizerFast.from_pretrained(folder)

    def preprocess(self, image: Image.Image) -> Tensor:
        """By ``preprocessor_config.json``."""
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def image_features(self, pixels: Tensor) -> Tensor:
        """Of the vision model and its projection."""
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return unit_norm(self.model.visual_projection(pooled))

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Of the text model and its projection, by the folder's tokenizer."""
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(**inputs.to(self.device)).pooler_output
        return unit_norm(self.model.text_projection(pooled))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, for files that are read and written at once."""
    logging = _hf.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load(
    folder: Path, manifest: dict[str, Any], classifier: Classifier, device: torch.device
) -> TransformersPredictor:
    """Reads the folder."""
    return TransformersPredictor(folder, classifier, device)
