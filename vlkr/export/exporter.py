"""``vlkr export``: from a run to a folder that is used without vlkr."""

from __future__ import annotations

import math
import shlex
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlkr.adapters import merge_adapters, set_adapter_scale
from vlkr.datasets import Dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.runs import load_run, run_dataset
from vlkr.export.card import dataset_name, model_card
from vlkr.export.formats import DTYPES, Classifier, Predictor, Subject, get_format
from vlkr.export.hub import check_repository, push
from vlkr.export.parity import Parity, check_parity
from vlkr.export.preprocessing import Preprocessing
from vlkr.files import atomic_folder, check_free, read_json, write_json, write_text
from vlkr.hashing import weights_hash
from vlkr.models.clip import logit_scale, pick_device
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts
from vlkr.version import __version__

MANIFEST = "vlkr_export.json"
EMBEDDINGS = "class_embeddings.safetensors"
_TEXTS_AT_A_TIME = 256


@dataclass(frozen=True)
class ExportResult:
    """A written export.

    Attributes:
        folder: where it is.
        format: of its files.
        dtype: of its weights.
        parity: how near it comes to the adapted model.
        address: on the hub, if it was pushed there.
    """

    folder: Path
    format: str
    dtype: str
    parity: Parity
    address: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "folder": str(self.folder),
            "format": self.format,
            "dtype": self.dtype,
            "parity": self.parity.to_json(),
            "address": self.address,
        }

    def show(self, console: Console) -> None:
        """Prints where the export is and how near it comes to the adapted model."""
        pushed = "" if self.address is None else f" Pushed to {escape(self.address)}."
        console.print(
            f"Exported to [bold]{escape(str(self.folder))}[/] ({self.format}, {self.dtype}). "
            f"{self.parity.summary()}{pushed}",
            highlight=False,
        )


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

    The adapters are merged in fp32 and cast then. The export is loaded again and compared with the
    adapted model on the run's test images before it gets its name.

    Args:
        run: written by ``vlkr adapt``.
        output: the folder to write.
        format: ``open_clip``, ``timm``, ``transformers``, ``onnx``, ``torch`` or ``adapter``.
        dtype: of the weights: ``float32``, ``float16`` or ``bfloat16``.
        alpha: the adapter's strength, 0 for the base model, 1 for the adapted one.
        force: replace the export that is there.
        push_to_hub: a repository, ``ORG/NAME``, to upload the export to.

    Raises:
        VlkrError: if the run cannot be read, ``output`` exists, the format cannot hold the model,
            or the export differs from it.
    """
    writer = get_format(format)
    if dtype not in DTYPES:
        raise VlkrError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise VlkrError(
            f"alpha {alpha} is out of range, expected at least 0; 0 is the base, 1 the adapted"
        )
    check_free(output, force=force)
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise VlkrError(f"{output} holds no export; --force replaces nothing else")
    if push_to_hub is not None:
        check_repository(push_to_hub)
    with Console(stderr=True).status(f"exporting to {escape(str(output))}"):
        subject, dataset = load_subject(run, alpha)
        description = writer.describe(subject)
        with atomic_folder(output, force=force) as temporary:
            manifest = _manifest(subject, format, dtype)
            try:
                writer.write(subject, temporary, DTYPES[dtype])
                _save_classifier(subject.classifier, temporary)
            except SafetensorError as error:
                raise VlkrError(f"cannot write {output}: {error}") from error
            write_json(temporary / MANIFEST, manifest)
            parity = check_parity(subject, load_export(temporary), dataset, DTYPES[dtype])
            write_json(temporary / MANIFEST, manifest | {"parity": parity.to_json()})
            card = model_card(
                subject,
                description,
                parity,
                dtype=dtype,
                command=_command(run, output, format, dtype, alpha),
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
def load_subject(run: Path, alpha: float) -> tuple[Subject, Dataset]:
    """A run's adapted model, ready for export, and its dataset.

    Args:
        run: written by ``vlkr adapt``.
        alpha: the adapter's strength.

    Raises:
        VlkrError: if the run cannot be read.
    """
    bundle, config = load_run(run)
    dataset = run_dataset(config)
    set_adapter_scale(bundle.model, alpha)
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
    return Subject(run, config, bundle, plain, preprocessing, classifier, alpha), dataset


def load_export(folder: Path, device: str = "cpu") -> Predictor:
    """An export, by the library that its format is made for.

    Raises:
        VlkrError: if the folder holds no export, or is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise VlkrError(
            f"no export at {folder}: {MANIFEST} is missing; `vlkr export` writes one from a run"
        )
    manifest = read_json(folder / MANIFEST)
    try:
        reader = get_format(manifest["format"])
        tensors = load_file(folder / EMBEDDINGS)
        classifier = Classifier(
            tuple(manifest["class_names"]),
            tuple(manifest["templates"]),
            tensors["class_embeddings"],
            tensors["logit_scale"].item(),
        )
        return reader.load(folder, manifest, classifier, pick_device(device))
    except VlkrError:
        raise
    # The formats' libraries raise whatever their parsers stumble over.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise VlkrError(f"export {folder} is damaged: {type(error).__name__} {reason}") from error


def _save_classifier(classifier: Classifier, folder: Path) -> None:
    tensors = {
        "class_embeddings": classifier.class_embeddings.contiguous(),
        "logit_scale": torch.tensor(classifier.logit_scale),
    }
    save_file(tensors, folder / EMBEDDINGS, metadata={"format": "pt"})


def _manifest(subject: Subject, format_name: str, dtype: str) -> dict[str, Any]:
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
            "shots": config["data"]["shots"],
            "seed": config["seed"],
        },
        "class_names": list(subject.classifier.class_names),
        "templates": list(subject.classifier.templates),
        "preprocessing": subject.preprocessing.to_json(),
    }


def _command(run: Path, output: Path, format_name: str, dtype: str, alpha: float) -> str:
    names = [path.absolute().name for path in (run, output)]
    words = ["vlkr", "export", "--run", names[0], "--format", format_name, "--output", names[1]]
    words += ["--dtype", dtype] if dtype != "float32" else []
    words += ["--alpha", f"{alpha:g}"] if alpha != 1 else []
    return shlex.join(words)
