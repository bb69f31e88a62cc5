"""``torch.export`` archives (``.pt2``) that torch alone runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from vlkr.errors import VlkrError
from vlkr.export.formats import Format, Preprocessing
from vlkr.export.graphs import ExportedGraphs, graph_metadata, trace

METADATA = "metadata.json"


class ExportedPrograms(ExportedGraphs):
    """An export run by torch."""

    def _load(self) -> None:
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

    def _run(self, name: str, inputs: Tensor) -> Tensor:
        graph = self.graph if name == "classifier" else self._program(name)
        outputs: Tensor = graph(inputs.to(self.device))
        return outputs


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
