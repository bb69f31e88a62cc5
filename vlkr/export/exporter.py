"""From a run to what a format writes, and from an export's folder back to a model."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlkr.adapters import merge_adapters, set_adapter_scale
from vlkr.datasets import Dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.runs import adapter_scale, load_run, run_dataset, run_options
from vlkr.export.card import dataset_name
from vlkr.export.formats import Classifier, Predictor, Subject, get_format
from vlkr.export.preprocessing import Preprocessing
from vlkr.files import read_json
from vlkr.hashing import weights_hash
from vlkr.models.clip import logit_scale
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts
from vlkr.runtime import pick_device
from vlkr.version import __version__

MANIFEST = "vlkr_export.json"
EMBEDDINGS = "class_embeddings.safetensors"
_TEXTS_AT_A_TIME = 256
_KINDS: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "dtype": str,
    "alpha": (int, float),
    "base_model": str,
    "weights_sha256": str,
    "adapter": dict,
    "class_names": list,
    "templates": list,
}


@torch.no_grad()
def load_subject(run: Path, alpha: float) -> tuple[Subject, Dataset]:
    """A run's adapted model, ready for export, and its dataset.

    Args:
        run: written by ``vlkr adapt``.
        alpha: the adapter's strength; a run that was saved along the line to its base has one
            already, which is multiplied.

    Raises:
        VlkrError: if the run cannot be read.
    """
    bundle, config = load_run(run)
    dataset = run_dataset(config)
    strength = alpha * adapter_scale(bundle)
    set_adapter_scale(bundle.model, strength)
    plain = deepcopy(bundle.model)
    merge_adapters(plain)
    if bundle.head is not None:
        embeddings = bundle.head(dataset.class_names)
    else:
        prompts = tokenize_prompts(bundle.tokenizer, dataset.class_names, dataset.templates)
        embeddings = class_embeddings(plain, prompts, chunk=_TEXTS_AT_A_TIME)
    classifier = Classifier(
        dataset.class_names, dataset.templates, embeddings.float(), logit_scale(plain).item()
    )
    preprocessing = Preprocessing.of(bundle)
    return Subject(run, config, bundle, plain, preprocessing, classifier, strength), dataset


def read_manifest(folder: Path) -> dict[str, Any]:
    """What :func:`make_manifest` told of an export.

    Raises:
        VlkrError: if the folder holds no export, or its manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise VlkrError(
            f"no export at {folder}: {MANIFEST} is missing; `vlkr export` writes one from a run"
        )
    manifest = read_json(path)
    for key, kind in _KINDS.items():
        value = manifest.get(key)
        if not isinstance(value, kind):
            raise VlkrError(f"{path} is damaged: its {key} is {value!r:.80}")
    return manifest


def load_export(folder: Path, device: str = "cpu") -> Predictor:
    """An export, by the library that its format is made for.

    Raises:
        VlkrError: if the folder holds no export, or is damaged.
    """
    manifest = read_manifest(folder)
    try:
        reader = get_format(manifest["format"])
        tensors = load_file(folder / EMBEDDINGS)
        classifier = Classifier(
            tuple(manifest["class_names"]),
            tuple(manifest["templates"]),
            tensors["class_embeddings"],
            tensors["logit_scale"].item(),
        )
        predictor = reader.load(folder, manifest, classifier, pick_device(device))
        _try_out(predictor)
    except VlkrError:
        raise
    # The formats' libraries raise whatever their parsers stumble over.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise VlkrError(f"export {folder} is damaged: {type(error).__name__} {reason}") from error
    return predictor


@torch.inference_mode()
def _try_out(predictor: Predictor) -> None:
    """Classifies a black image: some damage is met by no reader, but by the first image."""
    pixels = predictor.preprocess(Image.new("RGB", (64, 64)))
    logits = predictor.logits(pixels[None].to(predictor.device))
    expected = (1, len(predictor.classifier.class_names))
    if tuple(logits.shape) != expected:
        raise ValueError(f"it gives logits {tuple(logits.shape)}, expected {expected}")


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Writes the class embeddings, whatever the format."""
    tensors = {
        "class_embeddings": classifier.class_embeddings.contiguous(),
        "logit_scale": torch.tensor(classifier.logit_scale),
    }
    save_file(tensors, folder / EMBEDDINGS, metadata={"format": "pt"})


def make_manifest(subject: Subject, format_name: str, dtype: str) -> dict[str, Any]:
    """What ``vlkr_export.json`` tells of an export."""
    config = subject.config
    return {
        "format": format_name,
        "dtype": dtype,
        "alpha": subject.alpha,
        "vlkr_version": __version__,
        "base_model": subject.adapted.name,
        "base_pretrained": subject.adapted.pretrained,
        "base_sha256": subject.adapted.weights_hash,
        "weights_sha256": weights_hash(subject.plain),
        "adapter": config["adapter"],
        "data": {
            "name": dataset_name(config),
            **{k: v for k, v in run_options(config).context().items() if v is not None},
            "seed": config["seed"],
        },
        "class_names": list(subject.classifier.class_names),
        "templates": list(subject.classifier.templates),
        "preprocessing": subject.preprocessing.to_json(),
    }
