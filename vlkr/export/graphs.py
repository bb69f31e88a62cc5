"""Encoders and classifier as graphs that ``torch.export`` traces, for onnx and torch."""

from __future__ import annotations

import copy
import logging
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vlkr.errors import VlkrError
from vlkr.export.formats import Exported, ExportInput, unit_norm
from vlkr.models.clip import encode_image

# Names of the input and the output of each graph.
GRAPHS = {
    "image_encoder": ("pixel_values", "image_features"),
    "text_encoder": ("input_ids", "text_features"),
    "classifier": ("pixel_values", "logits"),
}


class ImageEncoder(nn.Module):
    """Maps normalized fp32 pixels to unit norm ``(batch, embed_dim)``, fp32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``(batch, 3, height, width)`` to ``(batch, embed_dim)``."""
        return unit_norm(encode_image(self.model, pixel_values.to(self.dtype)))


class TextEncoder(nn.Module):
    """Maps token ids to unit norm ``(num_texts, embed_dim)``, fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps ``(num_texts, context_length)``, int64, to ``(num_texts, embed_dim)``."""
        return unit_norm(self.model.encode_text(input_ids))  # type: ignore[operator]


class ImageClassifier(nn.Module):
    """Maps pixels to the logits of the run's classes, whose embeddings are constants."""

    def __init__(self, encoder: ImageEncoder, class_embeddings: Tensor, scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.weight: Tensor
        self.register_buffer("weight", scale * class_embeddings)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``(batch, 3, height, width)`` to ``(batch, num_classes)``."""
        features: Tensor = self.encoder(pixel_values)
        return features @ self.weight.T


class ExportedGraphs(Exported):
    """An export of graphs, run by name; a subclass reads ``preprocess`` from the classifier."""

    @abstractmethod
    def _run(self, name: str, inputs: Tensor) -> Tensor:
        """Runs one graph; ``classifier`` stays in memory."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """Runs the image encoder."""
        return self._run("image_encoder", pixels)

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Runs the text encoder."""
        return self._run("text_encoder", tokens)

    def logits(self, pixels: Tensor) -> Tensor:
        """Runs the classifier."""
        return self._run("classifier", pixels)


def trace(
    source: ExportInput, dtype: torch.dtype, names: Collection[str] = GRAPHS.keys()
) -> Iterator[tuple[str, ExportedProgram]]:
    """Yields the graphs by name, each for any batch size; no text encoder without a text tower.

    Weights and computation are in ``dtype``; inputs and outputs are always fp32.
    """
    model = source.merged
    encoder = ImageEncoder(_part(model, ["visual"], dtype), dtype)
    head = source.classifier
    pixels = torch.zeros(2, 3, *source.preprocessing.size)
    graphs: dict[str, tuple[nn.Module, Tensor]] = {"image_encoder": (encoder, pixels)}
    if source.adapted.has_text:
        text = [name for name in model._modules if name not in ("visual", "text_decoder")]
        tokens = source.adapted.tokenizer([head.class_names[0], head.class_names[-1]])
        graphs["text_encoder"] = (TextEncoder(_part(model, text, dtype)), tokens)
    classifier = ImageClassifier(encoder, head.class_embeddings, head.logit_scale)
    graphs["classifier"] = (classifier, pixels)
    for name, (module, example) in graphs.items():
        if name not in names:
            continue
        try:
            with torch.no_grad(), quiet():
                program = torch.export.export(
                    module.eval(),
                    (example,),
                    dynamic_shapes={GRAPHS[name][0]: {0: Dim("batch")}},
                    strict=False,
                )
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise VlkrError(
                f"torch.export cannot trace the {name.replace('_', ' ')} of model "
                f"{source.adapted.name!r}: {reason[:300]}"
            ) from error
        program.example_inputs = None
        yield name, program


def graph_metadata(source: ExportInput) -> dict[str, Any]:
    """Returns what a program needs in addition to a graph."""
    head = source.classifier
    return {
        "labels": list(head.class_names),
        "templates": list(head.templates),
        "logit_scale": head.logit_scale,
        "preprocessing": source.preprocessing.to_json(),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings and log lines that tracers address to their own developers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _part(model: nn.Module, children: list[str], dtype: torch.dtype) -> nn.Module:
    """Returns the model without the weights that one encoder does not use."""
    part = copy.copy(model)
    part._modules = {name: model._modules[name] for name in children}
    if children == ["visual"]:
        part._parameters, part._buffers = {}, {}
    return part if dtype is torch.float32 else copy.deepcopy(part).to(dtype)
