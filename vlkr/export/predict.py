"""``vlkr predict``: classifies images with an exported model of any format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlkr.datasets.folders import image_files
from vlkr.datasets.images import decode_image
from vlkr.datasets.sources import IMAGE_EXTENSIONS, Sample, read_image
from vlkr.errors import SampleError, VlkrError
from vlkr.export.exporter import MANIFEST, load_export
from vlkr.export.formats import Predictor
from vlkr.files import check_free, read_json, write_text

FORMATS = ("table", "jsonl", "csv")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        image: its path.
        labels: class names, the likeliest first; empty for an image that cannot be read.
        probabilities: of these classes.
        error: why it cannot be read.
    """

    image: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The first choice, and the others if they were asked for."""
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        top = [
            {"label": label, "probability": round(probability, 6)}
            for label, probability in zip(self.labels, self.probabilities, strict=True)
        ]
        return {"image": self.image, **top[0], **({"top": top} if len(top) > 1 else {})}


@dataclass(frozen=True)
class Predictions:
    """What the model says of all images.

    Attributes:
        predictions: in the order of the images.
        context: model, format, dtype and what it was made from.
        format: in which they are shown.
        output: where they are written, None to show them.
    """

    predictions: list[Prediction]
    context: dict[str, Any]
    format: str = "table"
    output: Path | None = None

    @property
    def failed(self) -> int:
        """Number of images that cannot be read."""
        return sum(p.error is not None for p in self.predictions)

    @property
    def exit_code(self) -> int:
        """1 if an image could not be read."""
        return int(self.failed > 0)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            **self.context,
            "images": len(self.predictions),
            "failed": self.failed,
            "predictions": [p.to_json() for p in self.predictions],
        }

    def text(self) -> str:
        """As JSON Lines or CSV."""
        if self.format == "jsonl":
            lines = (json.dumps(p.to_json(), ensure_ascii=False) for p in self.predictions)
            return "".join(f"{line}\n" for line in lines)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self._rows())
        return buffer.getvalue()

    def show(self, console: Console) -> None:
        """Prints the predictions, or where they were written."""
        note = f"{len(self.predictions)} images, {self.failed} of them could not be read"
        if self.output is not None:
            console.print(f"{note}. Written to {self.output}", highlight=False, markup=False)
        elif self.format == "table":
            caption = ", ".join(f"{key} {value}" for key, value in self.context.items())
            table = Table(title=note, title_justify="left")
            header, *rows = self._rows()
            table.add_column(header[0], overflow="fold")
            for name in header[1:-1]:
                table.add_column(name, justify="right" if "prob" in name else "left")
            for *cells, error in rows:
                if error:
                    cells[1] = error
                table.add_row(*map(escape, cells))
            console.print(table)
            console.print(caption, style="dim", highlight=False, markup=False)
        else:
            console.file.write(self.text())

    def _rows(self) -> list[list[str]]:
        count = max(1, *(len(p.labels) for p in self.predictions))
        header = ["image"]
        for suffix in ("", *(f"_{i}" for i in range(2, count + 1))):
            header += [f"label{suffix}", f"probability{suffix}"]
        rows = [[*header, "error"]]
        for p in self.predictions:
            cells = [p.image]
            for label, probability in zip(p.labels, p.probabilities, strict=True):
                cells += [label, f"{probability:.4f}"]
            rows.append([*cells, *[""] * (len(header) - len(cells)), p.error or ""])
        return rows


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
    _check(format, top_k, batch_size, num_workers, output, force)
    if output is not None and format == "table":
        format = _format_of(output)
    paths = list(_image_paths(images))
    predictor = load_export(model, device)
    names = predictor.classifier.class_names
    if top_k > len(names):
        raise VlkrError(f"top-k {top_k} is too large, the model knows {len(names)} classes")
    predictions: list[Prediction] = []
    with _progress() as progress, torch.inference_mode():
        task = progress.add_task("predict", total=len(paths))
        loader: DataLoader[Any] = DataLoader(
            _Images(paths, predictor),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=_collate,
        )
        for batch in loader:
            predictions += _classify(predictor, batch, top_k)
            progress.update(task, completed=len(predictions))
    manifest = read_json(model / MANIFEST)
    context = {
        "model": model.name,
        "format": manifest["format"],
        "dtype": manifest["dtype"],
        "alpha": manifest["alpha"],
        "base": manifest["base_model"],
        "adapter": manifest["adapter"]["name"],
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


class _Images(Dataset[tuple[str, Tensor | None, str | None]]):
    """Path and pixels of an image, or path and what is wrong with it."""

    def __init__(self, paths: list[Path], predictor: Predictor) -> None:
        self.paths = paths
        self.preprocess = predictor.preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str | None]:
        path = self.paths[index]
        try:
            sample = Sample(path.name, read_image(path, path.name), 0)
            image: Image.Image = decode_image(sample)
        except SampleError as error:
            return str(path), None, error.reason
        return str(path), self.preprocess(image), None


def _collate(
    items: list[tuple[str, Tensor | None, str | None]],
) -> tuple[Tensor | None, list[tuple[str, str | None]]]:
    pixels = [tensor for _, tensor, _ in items if tensor is not None]
    return torch.stack(pixels) if pixels else None, [(path, error) for path, _, error in items]


def _classify(
    predictor: Predictor,
    batch: tuple[Tensor | None, list[tuple[str, str | None]]],
    top_k: int,
) -> Iterator[Prediction]:
    pixels, rows = batch
    logits = (
        torch.empty(0, top_k) if pixels is None else predictor.logits(pixels.to(predictor.device))
    )
    found = logits.softmax(1).topk(top_k)
    best = zip(found.values.tolist(), found.indices.tolist(), strict=True)
    names = predictor.classifier.class_names
    for path, error in rows:
        if error is not None:
            yield Prediction(path, error=error)
        else:
            probabilities, labels = next(best)
            yield Prediction(path, tuple(names[i] for i in labels), tuple(probabilities))


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns()[:2],
        TextColumn("{task.completed} of {task.total} images"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
