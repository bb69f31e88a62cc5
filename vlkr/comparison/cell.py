"""One cell of a grid: trained, measured and written into its folder."""

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

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from vlkr.adapters import match_budget, remove_adapters
from vlkr.adapters.inject import hosts
from vlkr.comparison.plan import PROBE, ZERO_SHOT, Cell
from vlkr.comparison.probe import linear_probe
from vlkr.comparison.results import CONFIG, ERROR, PREDICTIONS, RESULT, is_finished, write_error
from vlkr.evaluation.predictions import Predictions
from vlkr.evaluation.report import Evaluation
from vlkr.evaluation.runs import load_run
from vlkr.evaluation.zero_shot import evaluate_bundle
from vlkr.files import atomic_file, read_json, write_json
from vlkr.models.clip import ClipBundle
from vlkr.models.loading import load_model
from vlkr.training.module import trained_parameters
from vlkr.training.recipe import train
from vlkr.training.trainer import CHECKPOINT

BATCH_SIZE = 128


def run_cell(cell: Cell, folder: Path) -> bool:
    """Computes a cell, unless it is finished, or another process is at it.

    A cell that fails leaves ``error.json`` in place of ``result.json``. One that was interrupted
    goes on from its last epoch.

    Args:
        cell: what to compute.
        folder: of the cell.

    Returns:
        False if another process holds the folder.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", blocking=False):
            if not is_finished(folder, cell):
                _compute(cell, folder)
    except Timeout:
        return False
    return True


def _compute(cell: Cell, folder: Path) -> None:
    config = folder / CONFIG
    resume = (
        (folder / "run" / CHECKPOINT).is_file()
        and config.is_file()
        and read_json(config).get("hash") == cell.hash
    )
    if not resume:
        shutil.rmtree(folder / "run", ignore_errors=True)
    for name in (RESULT, ERROR, PREDICTIONS):
        (folder / name).unlink(missing_ok=True)
    write_json(config, {"hash": cell.hash, "cell": cell.to_json()})
    started = time.perf_counter()
    owner = folder / "pid"
    owner.write_text(f"{os.getpid()}\n")
    try:
        evaluation, found = _measure(cell, folder, resume)
    except Exception as error:
        write_error(folder, type(error).__name__, str(error), traceback.format_exc())
    else:
        _write_predictions(evaluation, folder / PREDICTIONS)
        seconds = round(time.perf_counter() - started, 1)
        write_json(
            folder / RESULT,
            {"hash": cell.hash, **evaluation.to_json(), **found, "seconds": seconds},
        )
    owner.unlink()
    shutil.rmtree(folder / "run" / Path(CHECKPOINT).parts[0], ignore_errors=True)


def _measure(cell: Cell, folder: Path, resume: bool) -> tuple[Evaluation, dict[str, Any]]:
    bundle = load_run(cell.run)[0] if cell.run is not None else _model(cell.model, cell.pretrained)
    device = {"gpu": "cuda"}.get(cell.trainer.accelerator, cell.trainer.accelerator)
    found: dict[str, Any] = {
        "parameters": 0,
        "train_images": 0,
        "options": {},
        "val_acc1": None,
        "train_seconds": 0.0,
    }
    try:
        with _peak_memory() as memory:
            if cell.kind == PROBE:
                evaluation, probed = linear_probe(bundle, cell, device, BATCH_SIZE)
                found |= probed
            else:
                if cell.run is not None:
                    trained = trained_parameters(bundle.model, bundle.head)
                    found["parameters"] = sum(parameter.numel() for parameter in trained)
                    found["train_images"] = _images_of_run(cell.run)
                elif cell.kind != ZERO_SHOT:
                    found |= _train(cell, bundle, folder / "run", resume)
                evaluation = evaluate_bundle(
                    bundle,
                    [chosen.load() for chosen in cell.sets],
                    batch_size=BATCH_SIZE,
                    num_workers=cell.data.num_workers,
                    device=device,
                    keep_predictions=True,
                    cache=cell.kind == ZERO_SHOT,
                )
    finally:
        if any(True for _ in hosts(bundle.model)):
            remove_adapters(bundle.model)
        bundle.head = None
        bundle.model.to("cpu")
    return evaluation, {**found, **memory.to_json()}


def _train(cell: Cell, bundle: ClipBundle, output: Path, resume: bool) -> dict[str, Any]:
    adapter = cell.adapter
    if adapter.match is not None:
        budget = match_budget(
            adapter.name,
            bundle.model,
            adapter.match,
            **adapter.place(),
            to_options=dict(cell.match_options),
            **adapter.options,
        )
        adapter = replace(adapter, options=budget.options, match=None)
    training = train(
        output,
        bundle,
        cell.data.load(),
        adapter,
        cell.data,
        cell.optimizer,
        cell.trainer,
        cell.seed or 0,
        resume=resume,
    )
    return {
        "parameters": training.parameters,
        "train_images": training.images,
        "options": training.options,
        "val_acc1": training.val_acc1,
        "train_seconds": round(training.seconds, 1),
    }


def _images_of_run(run: Path) -> int | None:
    """How many images a run was trained on, as it says itself."""
    path = run / "metrics.json"
    return read_json(path).get("training images") if path.is_file() else None


@lru_cache(maxsize=1)
def _model(name: str, pretrained: str | None) -> ClipBundle:
    """The model of the last cell, for the next one."""
    return load_model(name, pretrained)


def forget_model() -> None:
    """Gives the model's memory back."""
    _model.cache_clear()


def _write_predictions(evaluation: Evaluation, path: Path) -> None:
    """Labels, predictions and their confidence by set, and a hash of the images' keys."""
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}
    for result in evaluation.results:
        predictions = result.predictions
        assert isinstance(predictions, Predictions)
        tensors[f"{result.dataset}.labels"] = torch.tensor(predictions.labels, dtype=torch.int32)
        tensors[f"{result.dataset}.predicted"] = torch.tensor(
            predictions.predicted, dtype=torch.int32
        )
        tensors[f"{result.dataset}.confidence"] = torch.tensor(predictions.confidence)
        keys[result.dataset] = blake2b("\n".join(predictions.keys).encode()).hexdigest()
    with atomic_file(path) as temporary:  # one entry, for the order of several is random
        save_file(tensors, temporary, metadata={"keys": json.dumps(keys)})


@dataclass
class _Memory:
    """The most memory that a cell took, in MiB, and where."""

    mib: float | None = None
    kind: str = "process"

    def to_json(self) -> dict[str, Any]:
        return {"peak_memory_mib": self.mib, "memory_of": self.kind}


@contextmanager
def _peak_memory() -> Iterator[_Memory]:
    """Measures the GPU's memory where there is one, else the process's resident memory.

    Linux alone can reset a process's peak; elsewhere none is given.
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
