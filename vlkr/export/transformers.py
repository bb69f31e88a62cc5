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
from vlkr.export.formats import Exported, ExportInput, Format, require_text, unit_norm
from vlkr.export.hf_clip import clip_mismatch, clip_tokenizer, context_length, convert_weights
from vlkr.models.clip import clip_bpe

_hf: Any = transformers  # its types differ from version to version
_ACTIVATIONS = {"QuickGELU": "quick_gelu", "none": "gelu", "tanh": "gelu_pytorch_tanh"}
_START_OF_TEXT, _END_OF_TEXT = 49406, 49407


class ExportedTransformers(Exported):
    """An export run by transformers."""

    def _load(self) -> None:
        with _no_progress_bars():
            self.model = _hf.CLIPModel.from_pretrained(self.folder).to(self.device).eval()
        # The processor that resizes with Pillow, as in training, has had both names.
        processor = getattr(_hf, "CLIPImageProcessorPil", _hf.CLIPImageProcessor)
        self.processor = processor.from_pretrained(self.folder)
        self.tokenizer = _hf.CLIPTokenizerFast.from_pretrained(self.folder)
        self.preprocess = self._pixels

    def _pixels(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def image_features(self, pixels: Tensor) -> Tensor:
        """Runs the vision model and its projection."""
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return unit_norm(self.model.visual_projection(pooled))

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Runs the text model and its projection on the ids of the folder's tokenizer."""
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(**inputs.to(self.device)).pooler_output
        return unit_norm(self.model.text_projection(pooled))


class TransformersFormat(Format):
    """The whole model for transformers."""

    library = "transformers"
    snippet = """\
from transformers import AutoProcessor, CLIPModel
model = CLIPModel.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
"""
    exported = ExportedTransformers

    def __init__(self, source: ExportInput) -> None:
        super().__init__(source)
        require_text(source, "transformers")
        self.processor_config = source.preprocessing.transformers()
        self.model = _build(source)

    def contents(self) -> str:
        """Returns a paragraph about model, processor and tokenizer."""
        return (
            "The whole model with the adapter merged into its weights, as transformers' "
            "`CLIPModel` (`config.json`, `model.safetensors`), `CLIPImageProcessor` "
            "(`preprocessor_config.json`) and `CLIPTokenizer`. transformers computes in the dtype "
            "that it loads the weights in. Its tokenizer does not repair texts (mojibake, HTML "
            "entities) as open_clip's does."
        )

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes model, processor and tokenizer."""
        with _no_progress_bars():
            self.model.to(dtype).save_pretrained(folder)
        _hf.CLIPImageProcessor(**self.processor_config).save_pretrained(folder)
        clip_tokenizer(self.source.adapted).save_pretrained(folder)


def _build(source: ExportInput) -> Any:
    """Returns a ``CLIPModel`` that shares the merged weights; an error names what cannot fit."""
    try:
        if mismatch := clip_mismatch(source.merged):
            raise VlkrError(mismatch)
        clip_bpe(source.adapted)
        state = convert_weights(source.merged.state_dict())
        with torch.device("meta"):  # all weights are replaced below, so none is initialized
            model = _hf.CLIPModel(_config(source, state))
        model.load_state_dict(state, assign=True)
    except (VlkrError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise VlkrError(
            f"model {source.adapted.name!r} does not fit transformers' CLIPModel: {reason}; "
            "choose another format"
        ) from error
    return model


def _config(source: ExportInput, state: dict[str, Tensor]) -> Any:
    visual: Any = source.merged.visual
    text: Any = getattr(source.merged, "text", source.merged)
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
            "max_position_embeddings": context_length(source.adapted),
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


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    logging = _hf.utils.logging
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
