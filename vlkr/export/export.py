"""``vlkr export``: from a run to a folder that needs no vlkr, and back to a model."""

from __future__ import annotations

import math
import shlex
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlkr.adapters import merge_and_unload, set_adapter_scale
from vlkr.adapters.hosts import weights_hash
from vlkr.datasets import Dataset
from vlkr.errors import VlkrError
from vlkr.export.card import check_repository, model_card, push
from vlkr.export.formats import (
    DTYPES,
    Classifier,
    Exported,
    ExportInput,
    Manifest,
    Preprocessing,
    get_format,
)
from vlkr.export.parity import Parity, check_parity
from vlkr.files import atomic_folder, check_free, read_json, write_json, write_text
from vlkr.models.clip import logit_scale
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts
from vlkr.reporting.table import Table
from vlkr.runs import RunFolder, adapter_scale
from vlkr.runtime import pick_device
from vlkr.validation import from_plain
from vlkr.version import __version__

MANIFEST = "vlkr_export.json"
EMBEDDINGS = "class_embeddings.safetensors"
_TEXTS_AT_A_TIME = 256


@dataclass(frozen=True)
class ExportResult:
    """A written export.

    Attributes:
        folder: path of the export.
        format: its format, as in :func:`export`.
        dtype: dtype of its weights.
        parity: agreement with the adapted model.
        address: its address on the hub, if it was pushed there.
    """

    folder: Path
    format: str
    dtype: str
    parity: Parity
    address: str | None = None
    exit_code: ClassVar[int] = 0

    def to_json(self) -> dict[str, Any]:
        """Returns all fields."""
        return asdict(self) | {"folder": str(self.folder)}

    def tables(self) -> list[Table]:
        """Returns none."""
        return []

    def lines(self) -> list[str]:
        """Returns where the export is and how it agrees with the adapted model."""
        pushed = "" if self.address is None else f" Pushed to {self.address}."
        return [
            f"Exported to {self.folder} ({self.format}, {self.dtype}). "
            f"{self.parity.summary()}{pushed}"
        ]


def export(
    run: Path,
    output: Path,
    format: str = "open_clip",
    dtype: str = "float32",
    alpha: float = 1.0,
    force: bool = False,
    push_to_hub: str | None = None,
) -> ExportResult:
    """Writes a run's adapted model in a form that needs no vlkr.

    The options are those of ``vlkr export``, whose help describes them.

    Raises:
        VlkrError: if the run cannot be read, ``output`` exists, the format cannot hold the model,
            or the export differs from it.
    """
    format_class = get_format(format)
    if dtype not in DTYPES:
        raise VlkrError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise VlkrError(
            f"alpha {alpha} is out of range, expected at least 0; 0 is the base, 1 the adapted"
        )
    check_free(output, force=force)
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise VlkrError(f"{output} does not hold an export; --force replaces nothing else")
    if push_to_hub is not None:
        check_repository(push_to_hub)
    with Console(stderr=True).status(f"exporting to {escape(str(output))}"):
        source, dataset = load_input(run, alpha)
        writer = format_class(source)
        with atomic_folder(output, force=force) as temporary:
            try:
                writer.write(temporary, DTYPES[dtype])
                _save_classifier(source.classifier, temporary)
            except SafetensorError as error:
                raise VlkrError(f"cannot write {output}: {error}") from error
            manifest = _manifest(source, format, dtype)
            write_json(temporary / MANIFEST, asdict(manifest))
            parity = check_parity(source, load_export(temporary), dataset, DTYPES[dtype])
            manifest = replace(manifest, parity=asdict(parity))
            write_json(temporary / MANIFEST, asdict(manifest))
            card = model_card(
                source,
                writer,
                manifest,
                parity,
                command=_command(run, output, manifest, alpha),
                folder=output.name,
                repository=push_to_hub,
            )
            write_text(temporary / "README.md", card)
    address = None
    if push_to_hub is not None:
        with Console(stderr=True).status(f"pushing to {escape(push_to_hub)}"):
            address = push(output, push_to_hub)
    return ExportResult(output, format, dtype, parity, address)


@torch.no_grad()
def load_input(run: Path, alpha: float) -> tuple[ExportInput, Dataset]:
    """Returns a run's adapted model, ready for export, and its dataset.

    ``alpha`` is relative to the scale that the run was saved with.
    """
    folder = RunFolder.open(run)
    bundle = folder.load_model()
    dataset = folder.dataset()
    strength = alpha * adapter_scale(bundle)
    set_adapter_scale(bundle.model, strength)
    merged = deepcopy(bundle.model)
    merge_and_unload(merged)
    if bundle.head is not None:
        embeddings = bundle.head(dataset.class_names)
    else:
        prompts = tokenize_prompts(bundle.tokenizer, dataset.class_names, dataset.templates)
        embeddings = class_embeddings(merged, prompts, chunk=_TEXTS_AT_A_TIME)
    source = ExportInput(
        config=folder.config,
        results=(folder.metrics() or {"results": []})["results"],
        adapted=bundle,
        merged=merged,
        preprocessing=Preprocessing.of(bundle),
        classifier=Classifier(
            dataset.class_names, dataset.templates, embeddings.float(), logit_scale(merged).item()
        ),
        alpha=strength,
    )
    return source, dataset


def read_manifest(folder: Path) -> Manifest:
    """Reads an export's manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise VlkrError(
            f"no export at {folder}: {MANIFEST} is missing; `vlkr export` writes one from a run"
        )
    content = read_json(path)
    try:
        return from_plain(Manifest, content, "manifest")
    except VlkrError as error:
        reason = str(error).removeprefix("manifest.")
        raise VlkrError(f"{path} is damaged: its {reason}") from error


def load_export(folder: Path, device: str = "cpu") -> Exported:
    """Loads an export by the library that its format is made for, and tries it out."""
    manifest = read_manifest(folder)
    try:
        format_class = get_format(manifest.format)
        tensors = load_file(folder / EMBEDDINGS)
        classifier = Classifier(
            tuple(manifest.class_names),
            tuple(manifest.templates),
            tensors["class_embeddings"],
            tensors["logit_scale"].item(),
        )
        exported = format_class.exported(folder, manifest, classifier, pick_device(device))
        _try_out(exported)
    except VlkrError:
        raise
    # The formats' libraries raise many kinds of errors on damaged files.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise VlkrError(f"export {folder} is damaged: {type(error).__name__} {reason}") from error
    return exported


@torch.inference_mode()
def _try_out(exported: Exported) -> None:
    """Classifies a black image: no reader notices some kinds of damage before the first image."""
    pixels = exported.preprocess(Image.new("RGB", (64, 64)))
    logits = exported.logits(pixels[None].to(exported.device))
    expected = (1, len(exported.classifier.class_names))
    if tuple(logits.shape) != expected:
        raise ValueError(f"its logits are {tuple(logits.shape)}, expected {expected}")


def _save_classifier(classifier: Classifier, folder: Path) -> None:
    tensors = {
        "class_embeddings": classifier.class_embeddings.contiguous(),
        "logit_scale": torch.tensor(classifier.logit_scale),
    }
    save_file(tensors, folder / EMBEDDINGS, metadata={"format": "pt"})


def _manifest(source: ExportInput, format: str, dtype: str) -> Manifest:
    data = source.config.data
    selection = {key: value for key, value in data.context().items() if value is not None}
    return Manifest(
        format=format,
        dtype=dtype,
        alpha=source.alpha,
        vlkr_version=__version__,
        base_model=source.adapted.name,
        base_pretrained=source.adapted.pretrained,
        base_sha256=source.adapted.weights_hash,
        weights_sha256=weights_hash(source.merged),
        adapter=asdict(source.config.adapter),
        data={"name": data.label, **selection, "seed": source.config.seed},
        class_names=list(source.classifier.class_names),
        templates=list(source.classifier.templates),
        preprocessing=source.preprocessing.to_json(),
    )


def _command(run: Path, output: Path, manifest: Manifest, alpha: float) -> str:
    names = [path.absolute().name for path in (run, output)]
    words = ["vlkr", "export", "--run", names[0], "--format", manifest.format]
    words += ["--output", names[1]]
    words += ["--dtype", manifest.dtype] if manifest.dtype != "float32" else []
    words += ["--alpha", f"{alpha:g}"] if alpha != 1 else []
    return shlex.join(words)
