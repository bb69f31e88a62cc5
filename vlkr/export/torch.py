"""``torch.export`` archives (``.pt2``) that torch alone runs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from vlkr.errors import VlkrError
from vlkr.export.formats import Classifier, Exported, Format, Manifest, Preprocessing
from vlkr.export.graphs import graph_metadata, trace

METADATA = "metadata.json"


class ExportedPrograms(Exported):
    """An export run by torch."""

    def __init__(
        self, folder: Path, manifest: Manifest, classifier: Classifier, device: torch.device
    ) -> None:
        super().__init__(folder, manifest, classifier, device)
        extra = {METADATA: ""}
        self.graph = self._program("classifier", extra)
        settings = json.loads(extra[METADATA])["preprocessing"]
        self.preprocess = Preprocessing.from_json(settings).transform()

    def _program(self, name: str, extra: dict[str, Any] | None = None) -> nn.Module:
        path = self.folder / f"{name}.pt2"
        if not is_zipfile(path):  # torch.export would print more than a line
            raise VlkrError(f"{path} is missing or damaged: it is not a zip archive")
        program = torch.export.load(path, extra_files=extra)
        return move_to_device_pass(program, self.device).module()

    def image_features(self, pixels: Tensor) -> Tensor:
        """Runs ``image_encoder.pt2``."""
        features: Tensor = self._program("image_encoder")(pixels)
        return features

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Runs ``text_encoder.pt2``."""
        features: Tensor = self._program("text_encoder")(tokens.to(self.device))
        return features

    def logits(self, pixels: Tensor) -> Tensor:
        """Runs ``classifier.pt2``."""
        logits: Tensor = self.graph(pixels)
        return logits


class TorchFormat(Format):
    """``torch.export`` programs of the encoders and the classifier."""

    library = "pytorch"
    snippet = """\
import torch
classifier = torch.export.load("{folder}/classifier.pt2").module()
image_encoder = torch.export.load("{folder}/image_encoder.pt2").module()
"""
    exported = ExportedPrograms

    def contents(self) -> str:
        """Returns a paragraph about the programs."""
        height, width = self.source.preprocessing.size
        text = "`text_encoder.pt2`, token ids to text features of norm 1; "
        return (
            "`torch.export` programs for any batch size: `image_encoder.pt2`, normalized pixels "
            f"(batch, 3, {height}, {width}) to image features of norm 1; "
            f"{text * self.source.adapted.has_text}`classifier.pt2`, normalized pixels to logits "
            "of the classes. Inputs and outputs are fp32 (token ids int64); weights and "
            f"computation are in the dtype below. The archives' extra file `{METADATA}` holds "
            "labels, preprocessing and logit scale."
        )

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the programs."""
        extra = {METADATA: json.dumps(graph_metadata(self.source))}
        for name, program in trace(self.source, dtype):
            # By way of memory: torch's own writer does not tell a full disk from other failures.
            buffer = io.BytesIO()
            torch.export.save(program, buffer, extra_files=extra)
            (folder / f"{name}.pt2").write_bytes(buffer.getbuffer())
