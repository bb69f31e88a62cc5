"""The few-shot recipe: adapters on a loaded model, trained by Lightning, in a run folder."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from vlkr.adapters import add_adapters, find_targets, match_budget, save_adapter
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataOptions, Dataset, FewShotDataModule
from vlkr.datasets.pipelines import evaluation_loader
from vlkr.datasets.samples import View
from vlkr.datasets.transforms import TrainTransform
from vlkr.errors import VlkrError
from vlkr.evaluation.runs import NEUTRAL
from vlkr.files import differences, read_yaml, write_text
from vlkr.models.classifier import ClassHead
from vlkr.models.clip import ClipBundle, encode_image, image_size
from vlkr.runtime import is_first_process
from vlkr.training.checkpoints import check_checkpoint
from vlkr.training.module import FewShotModule
from vlkr.training.trainer import CHECKPOINT, fit, make_trainer, quiet_lightning


@dataclass
class Training:
    """What training left in a run folder.

    Attributes:
        options: of the adapter, its size found where a budget was to be met.
        parameters: trained ones.
        images: different ones that were trained on; fewer than the shots ask for where a class
            has no more.
        seconds: of training.
        val_acc1: of the last epoch, on the few images set aside; None where there are none.
        device: trained on.
    """

    options: dict[str, Any]
    parameters: int
    images: int
    seconds: float
    val_acc1: float | None
    device: str


def train(
    output: Path,
    bundle: ClipBundle,
    dataset: Dataset,
    adapter: AdapterConfig,
    data: DataOptions,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    seed: int,
    *,
    resume: bool = False,
) -> Training:
    """Adds adapters to a loaded model, trains them and writes the run folder.

    Args:
        output: the run folder; what an earlier run left there is replaced.
        bundle: without adapters; has trained ones afterwards, on the CPU.
        dataset: what ``data`` names.
        adapter: method and targets.
        data: shots and batches.
        optimizer: learning rate and its kin.
        trainer: epochs, precision and device.
        seed: of the split, the initial factors, the order and the augmentation.
        resume: go on from ``checkpoints/last.ckpt``.

    Raises:
        VlkrError: for targets that match nothing, a budget that cannot be met, a class without
            images, a loss that is not finite, or a checkpoint that is damaged or of another
            configuration.
    """
    checkpoint = output / CHECKPOINT
    L.seed_everything(seed, workers=True, verbose=False)
    options, place = dict(adapter.options), adapter.place()
    if adapter.match is not None:
        budget = match_budget(adapter.name, bundle.model, adapter.match, **place, **options)
        options = budget.options
    config = {
        "model": bundle.name,
        "pretrained": bundle.pretrained,
        "adapter": {**asdict(adapter), "options": options, "match": None},
        "data": _plain(data.absolute()),
        "optimizer": asdict(optimizer),
        "trainer": asdict(trainer),
        "seed": seed,
    }
    if resume:
        _check_same_config(output / "config.yaml", config)
        check_checkpoint(checkpoint)
    find_targets(bundle.model, **place)
    datamodule = FewShotDataModule(
        dataset, data, seed, _train_transform(bundle, data), bundle.preprocess
    )
    if not bundle.has_text:
        bundle.head = _started_head(bundle, dataset, datamodule)
    add_adapters(bundle.model, adapter.name, **place, **options)
    module = FewShotModule(
        bundle, dataset.class_names, dataset.templates, optimizer, seed, data.classes_per_step
    )
    with quiet_lightning():
        lightning_trainer = make_trainer(output, trainer, optimizer.grad_clip)
        if is_first_process():
            if resume:
                _keep_log(output / "logs" / "csv" / "metrics.csv")
            else:
                _clear(output)
            write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            datamodule.save_split(output / "split.jsonl")
        started = time.perf_counter()
        fit(lightning_trainer, module, datamodule, checkpoint, resume=resume)
        if resume and "val_acc1" not in lightning_trainer.callback_metrics:  # all epochs were done
            lightning_trainer.validate(module, datamodule=datamodule, verbose=False)
    seconds = time.perf_counter() - started
    bundle.model.to("cpu").eval()
    if is_first_process():
        save_adapter(bundle.model, output / "adapter", base_model=bundle.label, force=True)
        if bundle.head is not None:
            bundle.head.cpu().save(output / "head.safetensors")
    val_acc1 = lightning_trainer.callback_metrics.get("val_acc1")
    return Training(
        options,
        sum(p.numel() for p in module.trained_parameters()),
        len(datamodule.train_keys),
        seconds,
        None if val_acc1 is None else round(float(val_acc1), 6),
        str(lightning_trainer.strategy.root_device),
    )


def _started_head(bundle: ClipBundle, dataset: Dataset, datamodule: FewShotDataModule) -> ClassHead:
    """Class embeddings at the mean features of the images to train on."""
    source = View(datamodule.pool, times=datamodule.train_keys)
    loader = evaluation_loader(source, bundle.preprocess, 32, datamodule.options.num_workers)
    head = ClassHead(dataset.class_names, bundle.model_cfg["embed_dim"])
    with torch.no_grad():
        head.start(
            (encode_image(bundle.model, loader.normalize(batch.images)), batch.labels)
            for batch in loader
        )
    return head


def _plain(data: DataOptions) -> dict[str, Any]:
    """What YAML holds as it is."""
    root = None if data.root is None else str(data.root)
    return {**asdict(data), "root": root, "crop_scale": list(data.crop_scale)}


def _train_transform(bundle: ClipBundle, data: DataOptions) -> TrainTransform:
    cfg = bundle.preprocess_cfg
    return TrainTransform(
        image_size(bundle),
        cfg["mean"],
        cfg["std"],
        cfg["interpolation"],
        data.crop_scale,
        data.flip,
    )


def _keep_log(log: Path) -> None:
    """Renames the CSV log of the part before, which Lightning would delete."""
    if log.is_file():
        log.rename(log.with_name(f"metrics-{len(list(log.parent.glob('*.csv')))}.csv"))


def _clear(output: Path) -> None:
    """Removes what an earlier run left, and nothing else."""
    for name in ("adapter", "logs", Path(CHECKPOINT).parts[0]):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("config.yaml", "split.jsonl", "head.safetensors", "metrics.json", "report.md"):
        (output / name).unlink(missing_ok=True)


def _check_same_config(path: Path, config: dict[str, Any]) -> None:
    for key, change in differences(read_yaml(path), config).items():
        if key not in NEUTRAL:
            raise VlkrError(f"cannot resume: {change} in {path}")
