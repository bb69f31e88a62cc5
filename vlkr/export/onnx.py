"""ONNX graphs, checked by onnx and run by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from onnxscript import ir
from torch import Tensor

from vlkr.errors import VlkrError
from vlkr.export.formats import Classifier, Format, Preprocessing
from vlkr.export.graphs import GRAPHS, ExportedGraphs, graph_metadata, quiet, trace
from vlkr.export.hf_clip import write_tokenizer

_LARGE = 2**30  # protobuf is limited to 2 GiB; larger weights are stored in a separate file
_DTYPES = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


class ExportedOnnx(ExportedGraphs):
    """An export run by onnxruntime."""

    def _load(self) -> None:
        provider = "CUDAExecutionProvider" if self.device.type == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise VlkrError(f"onnxruntime has no {provider} here; use device 'cpu'")
        self.providers = [provider]
        self.graph = self._session("classifier")
        metadata = self.graph.get_modelmeta().custom_metadata_map
        self.preprocess = Preprocessing.from_json(json.loads(metadata["preprocessing"])).transform()

    def _session(self, name: str) -> Any:
        path = str(self.folder / f"{name}.onnx")
        return onnxruntime.InferenceSession(path, providers=self.providers)

    def _run(self, name: str, inputs: Tensor) -> Tensor:
        session = self.graph if name == "classifier" else self._session(name)
        (output,) = session.run(None, {session.get_inputs()[0].name: inputs.cpu().numpy()})
        array: NDArray[np.float32] = output
        return torch.from_numpy(array).to(self.device)


class OnnxFormat(Format):
    """ONNX graphs of the encoders and the classifier."""

    library = "onnx"
    snippet = """\
import json, onnxruntime
classifier = onnxruntime.InferenceSession("{folder}/classifier.onnx")
labels = json.loads(classifier.get_modelmeta().custom_metadata_map["labels"])
"""
    exported = ExportedOnnx

    def contents(self) -> str:
        """Returns a paragraph about the graphs."""
        height, width = self.source.preprocessing.size
        text = (
            "`text_encoder.onnx`, `input_ids` from the tokenizer's files to `text_features` of "
            "norm 1; "
        )
        return (
            "Graphs for any batch size: `image_encoder.onnx`, `pixel_values` (batch, 3, "
            f"{height}, {width}), normalized, to `image_features` of norm 1; "
            f"{text * self.source.adapted.has_text}`classifier.onnx`, `pixel_values` to `logits` "
            "of the classes. Their metadata hold labels, preprocessing and logit scale as JSON. "
            "Half-precision weights are stored as such and computed with in fp32, which every "
            "execution provider can do."
        )

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes and checks the graphs."""
        if self.source.adapted.has_text:
            write_tokenizer(self.source.adapted, folder)
        metadata = {key: json.dumps(value) for key, value in graph_metadata(self.source).items()}
        for name, program in trace(self.source, torch.float32, ("image_encoder", "text_encoder")):
            input_name, output_name = GRAPHS[name]
            with quiet():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    verbose=False,
                    input_names=[input_name],
                    output_names=[output_name],
                    dynamic_shapes={input_name: {0: "batch"}},
                )
            assert exported is not None
            exported.model.metadata_props.update(metadata)
            _save(exported.model, folder / f"{name}.onnx", dtype)
            if name == "image_encoder":
                _append_classes(exported.model, self.source.classifier)
                _save(exported.model, folder / "classifier.onnx", dtype)


def _append_classes(model: ir.Model, classifier: Classifier) -> None:
    """Turns an image encoder into a classifier: image features to logits."""
    graph = model.graph
    (features,) = graph.outputs
    assert features.shape is not None
    embeddings = classifier.logit_scale * classifier.class_embeddings.T
    weight = ir.Value(
        name="class_embeddings",
        shape=ir.Shape(embeddings.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.Tensor(embeddings.contiguous().numpy(), name="class_embeddings"),
    )
    graph.register_initializer(weight)
    product = ir.node("MatMul", [features, weight])
    (logits,) = product.outputs
    logits.name, logits.type = GRAPHS["classifier"][1], features.type
    logits.shape = ir.Shape([features.shape[0], embeddings.shape[1]])
    graph.append(product)
    graph.outputs[:] = [logits]


def _save(model: ir.Model, path: Path, dtype: torch.dtype) -> None:
    if dtype in _DTYPES:
        _store_in(model, _DTYPES[dtype])
    weights = (value.const_value for value in model.graph.initializers.values())
    large = sum(tensor.nbytes for tensor in weights if tensor is not None) > _LARGE
    ir.save(model, path, external_data=f"{path.name}.data" if large else None)
    onnx.checker.check_model(path, full_check=True)


def _store_in(model: ir.Model, dtype: ir.DataType) -> None:
    """Stores the weights in half precision, each followed by a cast to fp32."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size == 1:
            continue
        half = ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)
        stored = ir.Value(
            name=f"{value.name}.{dtype.name.lower()}",
            shape=ir.Shape(list(tensor.numpy().shape)),
            type=ir.TensorType(dtype),
            const_value=half,
        )
        node = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value})
        wide = node.outputs[0]
        wide.name, wide.shape, wide.type = value.name, value.shape, value.type
        ir.convenience.replace_all_uses_with(value, wide)
        del graph.initializers[str(value.name)]
        graph.register_initializer(stored)
        graph.insert_before(graph[0], node)
