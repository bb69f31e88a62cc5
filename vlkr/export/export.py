"""The command ``vlkr export``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from vlkr.errors import VlkrError
from vlkr.files import atomic_folder, check_free, write_json, write_text

if TYPE_CHECKING:
    from vlkr.export.parity import Parity


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
    from safetensors import SafetensorError

    from vlkr.export.card import model_card
    from vlkr.export.exporter import (
        MANIFEST,
        load_export,
        load_subject,
        make_manifest,
        save_classifier,
    )
    from vlkr.export.formats import DTYPES, get_format
    from vlkr.export.hub import check_repository, push
    from vlkr.export.parity import check_parity

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
            manifest = make_manifest(subject, format, dtype)
            try:
                writer.write(subject, temporary, DTYPES[dtype])
                save_classifier(subject.classifier, temporary)
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


def _command(run: Path, output: Path, format_name: str, dtype: str, alpha: float) -> str:
    names = [path.absolute().name for path in (run, output)]
    words = ["vlkr", "export", "--run", names[0], "--format", format_name, "--output", names[1]]
    words += ["--dtype", dtype] if dtype != "float32" else []
    words += ["--alpha", f"{alpha:g}"] if alpha != 1 else []
    return shlex.join(words)
