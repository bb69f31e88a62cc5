"""``torch.export`` archives (``.pt2``) that torch alone runs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from PIL import Image
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from vlkr.errors import VlkrError
from vlkr.export.formats import Classifier, Description, Predictor, Subject
from vlkr.export.graphs import graph_metadata, trace
from vlkr.export.preprocessing import Preprocessing

_SNIPPET = """\
import torch
classifier = torch.export.load("{folder}/classifier.pt2").module()
image_encoder = torch.export.load("{folder}/image_encoder.pt2").module()
"""
METADATA = "metadata.json"


def describe(subject: Subject) -> Description:
    """Programs."""
    height, width = subject.preprocessing.size
    text = "`text_encoder.pt2`, token ids to text features of norm 1; "
    return Description(
        "pytorch",
        "`torch.export` programs for any batch size: `image_encoder.pt2`, normalised pixels "
        f"(batch, 3, {height}, {width}) to image features of norm 1; "
        f"{text * subject.adapted.has_text}`classifier.pt2`, normalised pixels to logits of the "
        "classes. Inputs and outputs are fp32 (token ids int64); weights and computation are in "
        f"the dtype below. The archives' extra file `{METADATA}` holds labels, preprocessing and "
        "logit scale.",
        _SNIPPET,
    )


def write(subject: Subject, folder: Path, dtype: torch.dtype) -> None:
    """Writes the three programs."""
    extra = {METADATA: json.dumps(graph_metadata(subject))}
    for name, program in trace(subject, dtype):
        # By way of memory, for torch's own writer does not tell a full disk from other trouble.
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=extra)
        (folder / f"{name}.pt2").write_bytes(buffer.getbuffer())


class TorchPredictor(Predictor):
    """By the programs."""

    def __init__(self, folder: Path, classifier: Classifier, device: torch.device) -> None:
        super().__init__(classifier, device)
        self.folder = folder
        extra = {METADATA: ""}
        self.graph = self._program("classifier", extra)
        preprocessing = Preprocessing.from_json(json.loads(extra[METADATA])["preprocessing"])
        self.transform = preprocessing.transform()

    def _program(self, name: str, extra: dict[str, Any] | None = None) -> nn.Module:
        path = self.folder / f"{name}.pt2"
        if not is_zipfile(path):  # of which torch.export would say more than a line
            raise VlkrError(f"{path} is missing or damaged: it is no zip archive")
        program = torch.export.load(path, extra_files=extra)
        return move_to_device_pass(program, self.device).module()

    def preprocess(self, image: Image.Image) -> Tensor:
        """By the archive's metadata."""
        return self.transform(image)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Of ``image_encoder.pt2``."""
        features: Tensor = self._program("image_encoder")(pixels)
        return features

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor:
        """Of ``text_encoder.pt2``."""
        features: Tensor = self._program("text_encoder")(tokens.to(self.device))
        return features

    def logits(self, pixels: Tensor) -> Tensor:
        """Of ``classifier.pt2``."""
        logits: Tensor = self.graph(pixels)
        return logits


def load(
    folder: Path, manifest: dict[str, Any], classifier: Classifier, device: torch.device
) -> TorchPredictor:
    """Reads the folder."""
    return TorchPredictor(folder, classifier, device)
