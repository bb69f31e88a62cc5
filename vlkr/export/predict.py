"""The command ``vlkr predict``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlkr.datasets.lists import image_files
from vlkr.datasets.samples import IMAGE_EXTENSIONS
from vlkr.errors import VlkrError
from vlkr.export.predictions import Predictions
from vlkr.files import check_free, write_text

FORMATS = ("table", "jsonl", "csv")


def predict(
    model: Path,
    images: list[Path],
    format: str = "table",
    top_k: int = 1,
    output: Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    force: bool = False,
) -> Predictions:
    """Classifies images with an exported model.

    An image that cannot be read is told of in its row; the others are classified all the same, and
    the exit status is 1.

    Args:
        model: a folder written by ``vlkr export``, of any format.
        images: files, and folders whose images are found at any depth.
        format: ``table``, ``jsonl`` or ``csv``.
        top_k: classes an image.
        output: a file to write, as its ending (``.jsonl``, ``.csv``) or ``format`` tells, in place
            of showing the predictions.
        batch_size: images at a time.
        num_workers: processes that decode images; 0 does it in the main one.
        device: ``auto``, ``cpu``, ``cuda``, ...
        force: replace the file that is there.

    Raises:
        VlkrError: if the model or a path is missing, or an option is out of range.
    """
    from vlkr.export.classify import classify
    from vlkr.export.exporter import load_export, read_manifest

    _check(format, top_k, batch_size, num_workers, output, force)
    if output is not None and format == "table":
        format = _format_of(output)
    paths = list(_image_paths(images))
    predictor, manifest = load_export(model, device), read_manifest(model)
    known = len(predictor.classifier.class_names)
    if top_k > known:
        raise VlkrError(f"top-k {top_k} is too large, the model knows {known} classes")
    predictions = classify(predictor, paths, top_k, batch_size, num_workers)
    context = {
        "model": model.name,
        **{key: manifest[key] for key in ("format", "dtype", "alpha")},
        "base": manifest["base_model"],
        "adapter": manifest["adapter"].get("name"),
        "weights_sha256": manifest["weights_sha256"][:12],
    }
    result = Predictions(predictions, context, format, output)
    if output is not None:
        write_text(output, result.text())
    return result


def _check(
    format_name: str,
    top_k: int,
    batch_size: int,
    num_workers: int,
    output: Path | None,
    force: bool,
) -> None:
    if format_name not in FORMATS:
        raise VlkrError(f"unknown format {format_name!r}; known: {', '.join(FORMATS)}")
    for name, value, least in (
        ("top-k", top_k, 1),
        ("batch size", batch_size, 1),
        ("number of workers", num_workers, 0),
    ):
        if value < least:
            raise VlkrError(f"{name} {value} is too small, expected at least {least}")
    if output is not None:
        if output.exists() and not (force and output.is_file()):
            raise VlkrError(f"{output} exists already; name another file, or --force replaces it")
        check_free(output.parent, force=True)


def _format_of(output: Path) -> str:
    found = output.suffix.removeprefix(".")
    if found not in ("csv", "jsonl"):
        raise VlkrError(
            f"{output} does not tell its format: name it .csv or .jsonl, or give --format csv or "
            "jsonl"
        )
    return found


def _image_paths(given: list[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            found = image_files(path)
            if not found:
                raise VlkrError(f"no image in {path}, expected .{' .'.join(IMAGE_EXTENSIONS)}")
            yield from (path / name for name in found)
        elif path.exists():
            yield path
        else:
            raise VlkrError(f"no file or folder {path}")
