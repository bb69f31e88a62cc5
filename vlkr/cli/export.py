"""``vlkr export`` and ``vlkr predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkr.cli.options import Switch


def export(
    *,
    run: Path,
    output: Path,
    format: str = "open_clip",
    dtype: str = "float32",
    alpha: float = 1.0,
    force: Switch = False,
    push_to_hub: str | None = None,
) -> Any:
    """Writes a run's adapted model in a form that needs no vlkr.

    The adapters are merged in fp32 and then cast. The export is loaded again and compared with the
    adapted model on the run's test images before it gets its name.

    Args:
        run: folder written by ``vlkr adapt``.
        output: folder to write.
        format: ``open_clip``, ``timm``, ``transformers``, ``onnx``, ``torch`` or ``adapter``.
        dtype: dtype of the weights: ``float32``, ``float16`` or ``bfloat16``.
        alpha: scale of the adapter, 0 for the base model, 1 for the adapted one.
        force: replace an existing export.
        push_to_hub: repository, ``ORG/NAME``, to upload the export to.
    """
    from vlkr.export.export import export

    return export(run, output, format, dtype, alpha, force, push_to_hub)


def predict(
    images: list[Path],
    *,
    model: Path,
    format: str = "table",
    top_k: int = 1,
    output: Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    force: Switch = False,
) -> Any:
    """Classifies images with an exported model.

    An unreadable image is reported in its row; the others are classified all the same, and the
    exit status is 1.

    Args:
        images: files, and folders that are searched for images at any depth.
        model: folder written by ``vlkr export``, of any format.
        format: ``table``, ``jsonl`` or ``csv``.
        top_k: number of classes per image.
        output: file to write instead of printing; its extension (``.jsonl``, ``.csv``) or
            ``format`` sets the format.
        batch_size: number of images per batch.
        num_workers: number of processes that decode images; 0 decodes in the main process.
        device: ``auto``, ``cpu``, ``cuda``, ...
        force: replace an existing file.
    """
    from vlkr.export.predict import predict

    return predict(model, images, format, top_k, output, batch_size, num_workers, device, force)
