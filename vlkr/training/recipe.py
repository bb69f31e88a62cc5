"""The few-shot recipe: adapters on a loaded model, trained by Lightning, in a run folder."""

from __future__ import annotations

import time
from dataclasses import dataclass

import lightning as L
import torch

from vlkr.adapters import add_adapters, find_targets
from vlkr.datasets import Dataset, FewShotDataModule
from vlkr.datasets.loading import TrainTransform, evaluation_loader
from vlkr.datasets.samples import View
from vlkr.models.classifier import ClassHead
from vlkr.models.clip import ClipBundle, encode_image, image_size
from vlkr.runs import RunFolder, is_first_process
from vlkr.training.module import FewShotModule
from vlkr.training.trainer import check_checkpoint, fit, make_trainer, quiet_lightning


@dataclass(frozen=True)
class Training:
    """Facts about a training that has ended.

    Attributes:
        parameters: number of trained parameters.
        images: number of different training images; smaller than the shots ask for where a class
            has too few.
        seconds: training time.
        val_acc1: top-1 accuracy of the last epoch on the held-out images; None without any.
        device: where the model was trained.
    """

    parameters: int
    images: int
    seconds: float
    val_acc1: float | None
    device: str


def train(
    folder: RunFolder, bundle: ClipBundle, dataset: Dataset, *, resume: bool = False
) -> Training:
    """Adds adapters to a loaded model, trains them and writes the run folder.

    Args:
        folder: started, with a resolved configuration; what an earlier run left is replaced.
        bundle: without adapters; has trained ones afterwards, on the CPU.
        dataset: what the configuration's data name.
        resume: continue from the checkpoint.

    Raises:
        VlkrError: for targets that match nothing, a class without images, a loss that is not
            finite, or a checkpoint that is damaged or of different weights.
    """
    config, data = folder.config, folder.config.data
    L.seed_everything(config.seed, workers=True, verbose=False)
    if resume:
        check_checkpoint(folder.checkpoint)
    place = config.adapter.place()
    find_targets(bundle.model, **place)
    cfg = bundle.preprocess_cfg
    transform = TrainTransform(
        image_size(bundle),
        cfg["mean"],
        cfg["std"],
        cfg["interpolation"],
        data.crop_scale,
        data.flip,
    )
    datamodule = FewShotDataModule(dataset, data, config.seed, transform, bundle.preprocess)
    if not bundle.has_text:
        bundle.head = _initial_head(bundle, dataset, datamodule)
    add_adapters(bundle.model, config.adapter.name, **place, **config.adapter.options)
    module = FewShotModule(
        bundle,
        dataset.class_names,
        dataset.templates,
        config.optimizer,
        config.seed,
        data.classes_per_step,
    )
    with quiet_lightning():
        trainer = make_trainer(folder, config.trainer, config.optimizer.grad_clip)
        if is_first_process():
            folder.begin(resume=resume)
            datamodule.save_split(folder.split)
        started = time.perf_counter()
        fit(trainer, module, datamodule, folder.checkpoint, resume=resume)
        if resume and "val_acc1" not in trainer.callback_metrics:  # all epochs were done
            trainer.validate(module, datamodule=datamodule, verbose=False)
    seconds = time.perf_counter() - started
    bundle.model.to("cpu").eval()
    if is_first_process():
        folder.save(bundle)
    val_acc1 = trainer.callback_metrics.get("val_acc1")
    return Training(
        parameters=sum(p.numel() for p in module.trained_parameters()),
        images=len(datamodule.train_keys),
        seconds=seconds,
        val_acc1=None if val_acc1 is None else round(float(val_acc1), 6),
        device=str(trainer.strategy.root_device),
    )


def _initial_head(bundle: ClipBundle, dataset: Dataset, datamodule: FewShotDataModule) -> ClassHead:
    """Class embeddings at the mean features of the training images."""
    source = View(datamodule.pool, times=datamodule.train_keys)
    loader = evaluation_loader(source, bundle.preprocess, 32, datamodule.options.num_workers)
    head = ClassHead(dataset.class_names, bundle.model_cfg["embed_dim"])
    with torch.no_grad():
        head.start(
            (encode_image(bundle.model, loader.normalize(batch.images)), batch.labels)
            for batch in loader
        )
    return head
