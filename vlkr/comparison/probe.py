"""The linear probe: logistic regression on frozen image features."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from vlkr.comparison.plan import Cell
from vlkr.datasets import Dataset, FewShotDataModule
from vlkr.datasets.samples import View
from vlkr.datasets.transforms import to_tensor
from vlkr.errors import VlkrError
from vlkr.evaluation.features import Features, image_features
from vlkr.evaluation.predictions import Predictions, predict
from vlkr.evaluation.report import Evaluation
from vlkr.evaluation.runs import run_validation
from vlkr.evaluation.zero_shot import dataset_result
from vlkr.models.clip import ClipBundle

#: inverse strengths of the L2 penalty that validation chooses from.
STRENGTHS = [float(c) for c in 10.0 ** np.arange(-3, 5)]


def linear_probe(
    bundle: ClipBundle, cell: Cell, device: str, batch_size: int
) -> tuple[Evaluation, dict[str, Any]]:
    """Trains a linear probe on a cell's few images and measures it on the cell's sets.

    Its images, for training and validation, are those that an adapter would get.

    Args:
        bundle: whose image features are frozen, and kept on disk.
        cell: data, seed and sets.
        device: where features are computed.
        batch_size: images at a time.

    Returns:
        The evaluation, and what else is recorded of the cell.

    Raises:
        VlkrError: for a set with a class that the probe has not learnt.
    """
    seed = cell.seed or 0

    def features(dataset: Dataset, split: str) -> Features:
        return image_features(
            bundle,
            dataset,
            split,
            batch_size=batch_size,
            num_workers=cell.data.num_workers,
            device=device,
        )

    dataset = cell.data.load()
    data = FewShotDataModule(dataset, cell.data, seed, to_tensor, to_tensor)
    few = replace(dataset, splits={"train": View(data.pool, times=data.train_keys)}, sizes={})
    validation = run_validation({"data": asdict(cell.data), "seed": seed}, None)
    train = features(few, "train")
    val = None if validation is None else features(validation, "val")
    probe, strength, val_acc1 = fit_probe(train, val)
    results = []
    for chosen in cell.sets:
        measured = chosen.load()
        columns = _columns(dataset.class_names, measured)
        found = features(measured, "test")
        logits = probe_logits(probe, found.features.numpy())[:, columns]
        said = predict(torch.from_numpy(logits), found.labels, found.keys, found.domains)
        results.append(dataset_result(measured, "test", Predictions.joined([said]), True))
    context = {
        "model": bundle.name,
        "pretrained": bundle.pretrained,
        "weights_sha256": bundle.weights_hash,
    }
    return Evaluation(results, context), {
        "parameters": int(probe.coef_.size + probe.intercept_.size),
        "train_images": len(data.train_keys),
        "options": {"C": strength},
        "val_acc1": val_acc1,
    }


def fit_probe(
    train: Features, val: Features | None
) -> tuple[LogisticRegression, float, float | None]:
    """Fits one probe for each strength and keeps the best on validation, of equals the simplest.

    Without validation images the strength is 1.

    Args:
        train: features to fit.
        val: features to choose with.

    Returns:
        The probe, its inverse strength and its validation accuracy.
    """
    best: tuple[LogisticRegression, float, float | None] | None = None
    for strength in STRENGTHS if val is not None else [1.0]:
        probe = LogisticRegression(C=strength, max_iter=5000)
        probe.fit(train.features.numpy().astype(np.float64), train.labels.numpy())
        accuracy = None
        if val is not None:
            predicted = probe_logits(probe, val.features.numpy()).argmax(1)
            accuracy = round(float((predicted == val.labels.numpy()).mean()), 6)
        if best is None or (accuracy or 0.0) > (best[2] or 0.0):
            best = probe, strength, accuracy
    assert best is not None
    return best


def probe_logits(probe: LogisticRegression, features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logits of all classes ``(num_images, num_classes)``, of two classes too."""
    scores: NDArray[np.float64] = probe.decision_function(features.astype(np.float64))
    return np.stack([np.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores


def _columns(learnt: tuple[str, ...], measured: Dataset) -> list[int]:
    for name in measured.class_names:
        if name not in learnt:
            raise VlkrError(
                f"the linear probe has not learnt class {name!r} of {measured.name!r}; leave "
                "'probe' out of the methods"
            )
    return [learnt.index(name) for name in measured.class_names]
