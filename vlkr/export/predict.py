"""``vlkr predict``: images through an exported model, shown as a table, JSON Lines or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import rich.table
import torch
from PIL import Image
from rich.progress import TextColumn
from rich.text import Text
from torch import Tensor

from vlkr.datasets.images import decode_image
from vlkr.datasets.lists import image_files
from vlkr.datasets.samples import IMAGE_EXTENSIONS, BadSample, Sample, read_image
from vlkr.errors import VlkrError, printable
from vlkr.export.export import load_export, read_manifest
from vlkr.export.formats import Exported
from vlkr.files import check_free, write_text
from vlkr.reporting.table import Table
from vlkr.runtime import parallel_map, progress_bar

FORMATS = ("table", "jsonl", "csv")


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image and their probabilities, the most likely first.

    An unreadable image has no classes but an ``error``.
    """

    image: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the first choice, and all of them if there are several."""
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        top = [
            {"label": label, "probability": round(probability, 6)}
            for label, probability in zip(self.labels, self.probabilities, strict=True)
        ]
        return {"image": self.image, **top[0], **({"top": top} if len(top) > 1 else {})}


@dataclass(frozen=True)
class Predictions:
    """The most likely classes of all images, in the order of the images.

    ``context`` names the model and its origin; ``format`` is ``table``, ``jsonl`` or ``csv``; with
    ``output`` they are written to a file and not shown.
    """

    predictions: list[Prediction]
    context: dict[str, Any]
    format: str = "table"
    output: Path | None = None

    @property
    def failed(self) -> int:
        """Number of unreadable images."""
        return sum(p.error is not None for p in self.predictions)

    @property
    def exit_code(self) -> int:
        """1 if an image is unreadable."""
        return int(self.failed > 0)

    def to_json(self) -> dict[str, Any]:
        """Returns all predictions with their context."""
        return {
            **self.context,
            "images": len(self.predictions),
            "failed": self.failed,
            "predictions": [p.to_json() for p in self.predictions],
        }

    def text(self) -> str:
        """Returns JSON Lines or CSV."""
        if self.format == "jsonl":
            lines = (json.dumps(p.to_json(), ensure_ascii=False) for p in self.predictions)
            return "".join(f"{_escaped(line)}\n" for line in lines)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self._rows())
        return buffer.getvalue()

    def tables(self) -> list[Table]:
        """Returns a table with a row per image, if it is to be shown."""
        if self.output is not None or self.format != "table":
            return []
        header, *rows = self._rows()
        # The reason stands in place of the label.
        rows = [row[:1] + ([f"({row[-1]})"] if row[-1] else row[1:2]) + row[2:-1] for row in rows]
        return [_PathTable.of(self._summary(), [header[:-1], *rows])]

    def lines(self) -> list[str]:
        """Returns the model, where the predictions were written, or JSON Lines or CSV."""
        if self.output is not None:
            return [f"{self._summary()}. Written to {self.output}"]
        if self.format == "table":
            return [", ".join(f"{key} {value}" for key, value in self.context.items())]
        return self.text().split("\n")[:-1]

    def _summary(self) -> str:
        number = len(self.predictions)
        failed = f", {self.failed} of them could not be read" if self.failed else ""
        return f"{number} image{'s' * (number != 1)}{failed}"

    def _rows(self) -> list[list[str]]:
        count = max((len(p.labels) for p in self.predictions), default=1) or 1
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


def _escaped(line: str) -> str:
    """Returns JSON with escapes for what could break the line or steer a terminal."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


class _PathTable(Table):
    """A table that folds long paths and left-aligns labels."""

    def rich(self) -> rich.table.Table:
        """Returns the table for the terminal."""
        table = rich.table.Table(title=Text(self.title), title_justify="left")
        table.add_column(self.header[0], overflow="fold")
        for name in self.header[1:]:
            table.add_column(name, justify="right" if "prob" in name else "left")
        for row in self.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        return table


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

    The options are those of ``vlkr predict``. An unreadable image is reported in its row; the
    others are classified all the same, and the exit status is 1.
    """
    _check(format, top_k, batch_size, num_workers, output, force)
    if output is not None and format == "table":
        format = output.suffix.removeprefix(".")
        if format not in ("csv", "jsonl"):
            raise VlkrError(
                f"cannot tell the format of {output}: name it .csv or .jsonl, or give --format csv "
                "or jsonl"
            )
    paths = list(_image_paths(images))
    exported, manifest = load_export(model, device), read_manifest(model)
    num_classes = len(exported.classifier.class_names)
    if top_k > num_classes:
        raise VlkrError(f"top-k {top_k} is too large, the model knows {num_classes} classes")
    context = {
        "model": model.name,
        "format": manifest.format,
        "dtype": manifest.dtype,
        "alpha": manifest.alpha,
        "base": manifest.base_model,
        "adapter": manifest.adapter.get("name"),
        "weights_sha256": manifest.weights_sha256[:12],
    }
    predictions = classify(exported, paths, top_k, batch_size, num_workers)
    result = Predictions(predictions, context, format, output)
    if output is not None:
        write_text(output, result.text())
    return result


def _check(
    format: str, top_k: int, batch_size: int, num_workers: int, output: Path | None, force: bool
) -> None:
    if format not in FORMATS:
        raise VlkrError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
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


def _image_paths(given: list[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            names = image_files(path)
            if not names:
                raise VlkrError(f"no image in {path}, expected .{' .'.join(IMAGE_EXTENSIONS)}")
            yield from (path / name for name in names)
        elif path.exists():
            yield path
        else:
            raise VlkrError(f"no file or folder {path}")


@torch.inference_mode()
def classify(
    exported: Exported, paths: list[Path], top_k: int, batch_size: int, num_workers: int
) -> list[Prediction]:
    """Returns the most likely classes of images, in their order; shows progress in a terminal."""
    predictions: list[Prediction] = []
    decoded = parallel_map(partial(_read, exported.preprocess), paths, num_workers)
    with progress_bar(TextColumn("{task.completed} of {task.total} images")) as progress:
        task = progress.add_task("predict", total=len(paths))
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            items = list(islice(decoded, len(batch)))
            predictions += _predictions(exported, batch, items, top_k)
            progress.update(task, completed=len(predictions))
    return predictions


def _read(preprocess: Callable[[Image.Image], Tensor], path: Path) -> Tensor | str:
    """Returns an image's pixels, or why it is unreadable."""
    encoded = read_image(path, path.name)
    if isinstance(encoded, BadSample):
        return encoded.reason
    image = decode_image(Sample(path.name, encoded, 0))
    return image.reason if isinstance(image, BadSample) else preprocess(image)


def _predictions(
    exported: Exported, paths: list[Path], items: list[Tensor | str], top_k: int
) -> Iterator[Prediction]:
    pixels = [item for item in items if isinstance(item, Tensor)]
    best: Iterator[tuple[list[float], list[int]]] = iter(())
    if pixels:
        logits = exported.logits(torch.stack(pixels).to(exported.device))
        if not logits.isfinite().all():
            raise VlkrError(
                f"the model's outputs are not finite for {paths[0]} and what follows; its weights "
                "are damaged, or too large for their dtype"
            )
        top = logits.softmax(1).topk(top_k)
        best = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    names = exported.classifier.class_names
    for path, item in zip(paths, items, strict=True):
        if isinstance(item, str):
            yield Prediction(str(path), error=item)
        else:
            probabilities, labels = next(best)
            yield Prediction(str(path), tuple(names[i] for i in labels), tuple(probabilities))
