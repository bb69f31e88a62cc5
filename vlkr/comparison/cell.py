"""One cell of a grid: trained, evaluated and written into its folder."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from vlkr.adapters import remove_adapters
from vlkr.adapters.hosts import adapter_layers
from vlkr.comparison.plan import Cell
from vlkr.comparison.results import CellFolder
from vlkr.datasets import Dataset
from vlkr.datasets.samples import View
from vlkr.datasets.splits import draw_split
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate_model
from vlkr.evaluation.features import Features, image_features
from vlkr.evaluation.metrics import measure
from vlkr.evaluation.predictions import Predictions, predict
from vlkr.evaluation.report import Evaluation
from vlkr.files import atomic_file, read_json, write_json
from vlkr.models.clip import ClipBundle
from vlkr.models.loading import load_model
from vlkr.runs import CHECKPOINT, RunFolder, validation_set
from vlkr.training.module import trained_parameters
from vlkr.training.recipe import train

BATCH_SIZE = 128
STRENGTHS = [float(c) for c in 10.0 ** np.arange(-3, 5)]
"""Inverse strengths of the probe's L2 penalty that validation chooses from."""


def run_cell(cell: Cell, folder: CellFolder) -> bool:
    """Computes a cell, unless it is finished or another process holds its folder.

    A cell that fails leaves ``error.json`` in place of ``result.json``. One that was interrupted
    resumes from its last epoch.

    Returns:
        False if another process holds the folder.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.path / "lock", blocking=False):
            if not folder.is_finished(cell):
                _compute(cell, folder)
    except Timeout:
        return False
    return True


def _compute(cell: Cell, folder: CellFolder) -> None:
    resume = (
        (folder.run / CHECKPOINT).is_file()
        and folder.config.is_file()
        and read_json(folder.config).get("hash") == cell.hash
    )
    if not resume:
        shutil.rmtree(folder.run, ignore_errors=True)
    for path in (folder.result, folder.error, folder.predictions):
        path.unlink(missing_ok=True)
    write_json(folder.config, {"hash": cell.hash, "cell": cell.to_json()})
    started = time.perf_counter()
    try:
        evaluation, costs = _evaluate(cell, folder.run, resume)
    except Exception as error:
        folder.fail(type(error).__name__, str(error), traceback.format_exc())
    else:
        _write_predictions(evaluation, folder.predictions)
        seconds = round(time.perf_counter() - started, 1)
        write_json(
            folder.result,
            {"hash": cell.hash, **evaluation.to_json(), **costs, "seconds": seconds},
        )
    shutil.rmtree((folder.run / CHECKPOINT).parent, ignore_errors=True)


def _evaluate(cell: Cell, run: Path, resume: bool) -> tuple[Evaluation, dict[str, Any]]:
    """The evaluation of a cell, and what else its result records."""
    config = cell.config
    trained_run = None if cell.run is None else RunFolder.open(cell.run)
    bundle = trained_run.load_model() if trained_run else _model(config.model, config.pretrained)
    accelerator = config.trainer.accelerator
    device = "cuda" if accelerator == "gpu" else accelerator
    costs: dict[str, Any] = {
        "parameters": 0,
        "train_images": 0,
        "options": {},
        "val_acc1": None,
        "train_seconds": 0.0,
    }
    try:
        with _peak_memory() as memory:
            if cell.kind == "probe":
                evaluation, probed = linear_probe(bundle, cell, device)
                costs |= probed
            else:
                if trained_run is not None:
                    trained = trained_parameters(bundle.model, bundle.head)
                    costs["parameters"] = sum(parameter.numel() for parameter in trained)
                    costs["train_images"] = (trained_run.metrics() or {}).get("training images")
                elif cell.kind == "adapter":
                    costs |= _train(cell, bundle, run, resume)
                evaluation = evaluate_model(
                    bundle,
                    [eval_set.load() for eval_set in cell.sets],
                    batch_size=BATCH_SIZE,
                    num_workers=config.data.num_workers,
                    device=device,
                    keep_predictions=True,
                    cache=cell.kind == "zero-shot",
                )
    finally:
        if any(True for _ in adapter_layers(bundle.model)):
            remove_adapters(bundle.model)
        bundle.head = None
        bundle.model.to("cpu")
    return evaluation, {**costs, **memory.to_json()}


def _train(cell: Cell, bundle: ClipBundle, run: Path, resume: bool) -> dict[str, Any]:
    config = replace(cell.config, model=bundle.name, pretrained=bundle.pretrained)
    config = config.resolved(bundle.model, cell.match_options)
    with RunFolder.start(run, config, resume=resume, force=True) as folder:
        training = train(folder, bundle, cell.config.data.load(), resume=resume)
    return {
        "parameters": training.parameters,
        "train_images": training.images,
        "options": config.adapter.options,
        "val_acc1": training.val_acc1,
        "train_seconds": round(training.seconds, 1),
    }


@lru_cache(maxsize=1)
def _model(name: str, pretrained: str | None) -> ClipBundle:
    """The model of the last cell, for the next one."""
    return load_model(name, pretrained)


def forget_model() -> None:
    """Releases the model's memory."""
    _model.cache_clear()


def linear_probe(bundle: ClipBundle, cell: Cell, device: str) -> tuple[Evaluation, dict[str, Any]]:
    """Trains logistic regression on a cell's few images and evaluates it on the cell's sets.

    Its images, for training and validation, are those that an adapter would get.

    Args:
        bundle: whose image features are frozen, and cached on disk.
        cell: data, seed and sets.
        device: where features are computed.

    Returns:
        The evaluation, and what else the cell's result records.

    Raises:
        VlkrError: for a set with a class that the probe has not learned.
    """
    seed = cell.config.seed

    def features(dataset: Dataset, split: str) -> Features:
        return image_features(
            bundle,
            dataset,
            split,
            batch_size=BATCH_SIZE,
            num_workers=cell.config.data.num_workers,
            device=device,
        )

    dataset = cell.config.data.load()
    drawn = draw_split(dataset, cell.config.data, seed)
    few = replace(dataset, splits={"train": View(drawn.pool, times=drawn.train_keys)}, sizes={})
    validation = validation_set(cell.config.data, seed)
    val = None if validation is None else features(validation, "val")
    probe, strength, val_acc1 = fit_probe(features(few, "train"), val)
    results = []
    for eval_set in cell.sets:
        measured = eval_set.load()
        columns = _columns(dataset.class_names, measured)
        images = features(measured, "test")
        logits = torch.from_numpy(probe_logits(probe, images.features.numpy())[:, columns])
        predictions = predict(logits, images.labels, images.keys, images.domains)
        results.append(measure(Predictions.joined([predictions]), measured, keep=True))
    context = {
        "model": bundle.name,
        "pretrained": bundle.pretrained,
        "weights_sha256": bundle.weights_hash,
    }
    return Evaluation(results, context), {
        "parameters": int(probe.coef_.size + probe.intercept_.size),
        "train_images": len(drawn.train_keys),
        "options": {"C": strength},
        "val_acc1": val_acc1,
    }


def fit_probe(
    train: Features, val: Features | None
) -> tuple[LogisticRegression, float, float | None]:
    """Fits a probe for each strength and keeps the best on validation, of equal ones the simplest.

    Args:
        train: features to fit.
        val: features to choose with; without them the strength is 1.

    Returns:
        The probe, its inverse strength and its validation accuracy.
    """
    probes: list[tuple[LogisticRegression, float, float | None]] = []
    for strength in STRENGTHS if val is not None else [1.0]:
        probe = LogisticRegression(C=strength, max_iter=5000)
        probe.fit(train.features.numpy().astype(np.float64), train.labels.numpy())
        accuracy = None
        if val is not None:
            predicted = probe_logits(probe, val.features.numpy()).argmax(1)
            accuracy = round(float((predicted == val.labels.numpy()).mean()), 6)
        probes.append((probe, strength, accuracy))
    return max(probes, key=lambda fitted: fitted[2] or 0.0)


def probe_logits(probe: LogisticRegression, features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns logits of all classes ``(num_images, num_classes)``, also of two classes."""
    scores: NDArray[np.float64] = probe.decision_function(features.astype(np.float64))
    return np.stack([np.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores


def _columns(learned: tuple[str, ...], measured: Dataset) -> list[int]:
    for name in measured.class_names:
        if name not in learned:
            raise VlkrError(
                f"the linear probe has not learned class {name!r} of {measured.name!r}; leave "
                "'probe' out of the methods"
            )
    return [learned.index(name) for name in measured.class_names]


def _write_predictions(evaluation: Evaluation, path: Path) -> None:
    """Labels, predictions and confidences by set, and a hash of the images' keys."""
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}
    for result in evaluation.results:
        predictions = result.predictions
        assert isinstance(predictions, Predictions)
        for column in ("labels", "predicted"):
            values = torch.tensor(getattr(predictions, column), dtype=torch.int32)
            tensors[f"{result.dataset}.{column}"] = values
        tensors[f"{result.dataset}.confidence"] = torch.tensor(predictions.confidence)
        keys[result.dataset] = blake2b("\n".join(predictions.keys).encode()).hexdigest()
    with atomic_file(path) as temporary:  # one entry, for the order of several is random
        save_file(tensors, temporary, metadata={"keys": json.dumps(keys)})


@dataclass
class _Memory:
    """Peak memory of a cell in MiB, and of what."""

    mib: float | None = None
    kind: str = "process"

    def to_json(self) -> dict[str, Any]:
        return {"peak_memory_mib": self.mib, "memory_of": self.kind}


@contextmanager
def _peak_memory() -> Iterator[_Memory]:
    """Measures the GPU's memory where there is one, else the process's resident memory.

    Only Linux can reset a process's peak; elsewhere it stays None.
    """
    memory = _Memory()
    if torch.cuda.is_available():
        memory.kind = torch.cuda.get_device_name()
        torch.cuda.reset_peak_memory_stats()
        yield memory
        memory.mib = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    can_reset = os.access(refs, os.W_OK)
    if can_reset:
        refs.write_text("5")
    yield memory
    if can_reset:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        memory.mib = round(int(line.split()[1]) / 2**10, 1)
