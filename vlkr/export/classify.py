"""Images through an exported model of any format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import TextColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlkr.datasets.images import decode_image
from vlkr.datasets.samples import BadSample, Sample, read_image
from vlkr.errors import VlkrError
from vlkr.export.formats import Predictor
from vlkr.export.predictions import Prediction
from vlkr.runtime import progress_bar


@torch.inference_mode()
def classify(
    predictor: Predictor, paths: list[Path], top_k: int, batch_size: int, num_workers: int
) -> list[Prediction]:
    """The likeliest classes of images, in their order; shows progress in a terminal.

    Args:
        predictor: an exported model.
        paths: of the images.
        top_k: classes an image.
        batch_size: images at a time.
        num_workers: processes that decode images; 0 does it in this one.

    Raises:
        VlkrError: if the model's numbers are not finite.
    """
    predictions: list[Prediction] = []
    loader: DataLoader[Any] = DataLoader(
        _Images(paths, predictor),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
    )
    with progress_bar(TextColumn("{task.completed} of {task.total} images")) as progress:
        task = progress.add_task("predict", total=len(paths))
        for batch in loader:
            predictions += _classify(predictor, batch, top_k)
            progress.update(task, completed=len(predictions))
    return predictions


class _Images(Dataset[tuple[str, Tensor | None, str | None]]):
    """Path and pixels of an image, or path and what is wrong with it."""

    def __init__(self, paths: list[Path], predictor: Predictor) -> None:
        self.paths = paths
        self.preprocess = predictor.preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str | None]:
        path = self.paths[index]
        content = read_image(path, path.name)
        image = (
            content
            if isinstance(content, BadSample)
            else decode_image(Sample(path.name, content, 0))
        )
        if isinstance(image, BadSample):
            return str(path), None, image.reason
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
    if not logits.isfinite().all():
        raise VlkrError(
            f"the model gives numbers that are not finite for {rows[0][0]} and what follows; its "
            "weights are damaged, or too large for their dtype"
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
