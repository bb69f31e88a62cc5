"""The few-shot recipe: trains adapters with Lightning and writes a run folder."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from vlkr.adapters import Projected, add_adapters, find_targets, project_model, save_adapter
from vlkr.adapters.registry import adapter_class
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig, Dataset
from vlkr.datasets.loading import TrainTransform, evaluation_loader
from vlkr.datasets.samples import View
from vlkr.datasets.training import FewShotDataModule
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate_model
from vlkr.evaluation.report import Evaluation
from vlkr.files import check_free
from vlkr.models.classifier import ClassHead
from vlkr.models.clip import ClipBundle, encode_image, image_size
from vlkr.models.loading import load_model
from vlkr.models.names import absolute_names
from vlkr.reporting.table import Table
from vlkr.runs import RunConfig, RunFolder
from vlkr.runtime import is_first_process
from vlkr.training.interruption import add_resume_hint, is_requeued
from vlkr.training.module import FewShotModule
from vlkr.training.trainer import check_checkpoint, fit, make_trainer, quiet_lightning


@dataclass
class AdaptResult:
    """A finished run.

    Attributes:
        output: the run folder.
        bundle: the model with trained adapters.
        evaluation: evaluation on the test split of the run's dataset.
        parameters: number of trained parameters.
        seconds: training time.
    """

    output: Path
    bundle: ClipBundle
    evaluation: Evaluation
    parameters: int
    seconds: float
    exit_code = 0

    def tables(self) -> list[Table]:
        """Returns the evaluation's tables."""
        return self.evaluation.tables()

    def lines(self) -> list[str]:
        """Returns the evaluation's caption, and where the run is."""
        trained = f"{self.parameters:,} parameters trained in {self.seconds:.0f} s"
        return [*self.evaluation.lines(), f"{trained}. Run: {self.output}"]

    def to_json(self) -> dict[str, Any]:
        """Returns the run's ``metrics.json``."""
        return self.evaluation.to_json() | {"train_seconds": round(self.seconds, 1)}


@dataclass(frozen=True)
class Training:
    """Summary of a finished training.

    Attributes:
        parameters: number of trained parameters.
        images: number of distinct training images; fewer than the shots imply if a class has too
            few.
        seconds: training time.
        val_acc1: top-1 accuracy of the last epoch on the held-out images; None without any.
        device: where the model was trained.
    """

    parameters: int
    images: int
    seconds: float
    val_acc1: float | None
    device: str


def adapt(
    output: Path,
    model: str = "tiny",
    pretrained: str | None = None,
    adapter: AdapterConfig = AdapterConfig(),
    data: DataConfig = DataConfig(),
    optimizer: OptimizerConfig = OptimizerConfig(),
    trainer: TrainerConfig = TrainerConfig(),
    seed: int = 1,
    resume: bool = False,
    force: bool = False,
) -> AdaptResult:
    """Adapts a model by name to a few labeled images per class and writes a run folder.

    The options are those of ``vlkr adapt``, whose help describes them.

    Raises:
        VlkrError: for an invalid option, before anything is written.
    """
    model, pretrained = absolute_names(model, pretrained)
    config = RunConfig(model, pretrained, adapter, data, optimizer, trainer, seed)
    config.check()
    adapter_class(adapter.name)
    folder = RunFolder(output, config)
    resume = resume or (is_requeued() and folder.checkpoint.is_file())
    folder.check_output(resume=resume, force=force)
    dataset = data.load()
    if next(iter(dataset.source("test")), None) is None:
        raise VlkrError(f"dataset {dataset.name!r} has no image in its split 'test'")
    bundle = load_model(model, pretrained)
    config = config.resolved(bundle.model)
    with (
        add_resume_hint(folder.checkpoint),
        RunFolder.start(output, config, resume=resume, force=force) as folder,
    ):
        training = train(folder, bundle, dataset, resume=resume)
        evaluation = evaluate_model(
            bundle, [dataset], batch_size=128, num_workers=data.num_workers, device=training.device
        )
        evaluation.context |= {
            "adapter": adapter.name,
            "options": config.adapter.options,
            "parameters": training.parameters,
            **data.context(),
            "training images": training.images,
            "classes per step": data.classes_per_step,
            "seed": seed,
            "checkpoint": "last iteration",
        }
        result = AdaptResult(output, bundle, evaluation, training.parameters, training.seconds)
        if is_first_process():
            folder.write_metrics(result.to_json(), evaluation.markdown())
    return result


def train(
    folder: RunFolder, bundle: ClipBundle, dataset: Dataset, *, resume: bool = False
) -> Training:
    """Adds adapters to a loaded model, trains them and writes the run folder.

    Args:
        folder: started run folder with a resolved configuration; an earlier run is replaced.
        bundle: model without adapters; afterwards it has trained ones and is on the CPU.
        dataset: dataset that the configuration names.
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
    """Returns a class head initialized with the mean features of the training images."""
    source = View(datamodule.pool, times=datamodule.train_keys)
    loader = evaluation_loader(source, bundle.preprocess, 32, datamodule.options.num_workers)
    head = ClassHead(dataset.class_names, bundle.model_cfg["embed_dim"])
    with torch.no_grad():
        head.start(
            (encode_image(bundle.model, loader.normalize(batch.images)), batch.labels)
            for batch in loader
        )
    return head


@dataclass
class ProjectResult:
    """A fine-tune projected onto an adapter: its folder, each layer's error, and the context."""

    output: Path
    layers: list[Projected]
    context: dict[str, Any]
    exit_code = 0

    @property
    def error(self) -> float:
        """Returns the unweighted root mean square of the layers' relative errors."""
        return math.sqrt(sum(layer.error**2 for layer in self.layers) / len(self.layers))

    def to_json(self) -> dict[str, Any]:
        """Returns context and layers."""
        layers = [
            {"layer": p.target.path, "change": p.delta_norm, "error": p.error} for p in self.layers
        ]
        return {**self.context, "output": str(self.output), "error": self.error, "layers": layers}

    def tables(self) -> list[Table]:
        """Returns one row per layer."""
        rows = [["layer", "change / weight", "error / change"]]
        rows += [[p.target.path, f"{p.delta_norm:.4f}", f"{p.error:.4f}"] for p in self.layers]
        rows.append(["root mean square", "", f"{self.error:.4f}"])
        return [Table.of("Relative Frobenius norms", rows)]

    def lines(self) -> list[str]:
        """Returns the context, and where the adapter is."""
        context = ", ".join(f"{key} {value}" for key, value in self.context.items())
        return [context, f"Adapter: {self.output}"]


def project_fine_tune(
    output: Path,
    base: str,
    tuned: str,
    base_pretrained: str | None = None,
    tuned_pretrained: str | None = None,
    adapter: AdapterConfig = AdapterConfig(),
    force: bool = False,
) -> ProjectResult:
    """Projects a full fine-tune onto the nearest adapter and writes it as an adapter folder.

    The options are those of ``vlkr project``, whose help describes them.

    Raises:
        VlkrError: if a model cannot be read, or the two differ in shape.
    """
    if adapter.match is not None:
        raise VlkrError("adapter.match cannot be used with project; use adapter.options")
    check_free(output, force=force)
    first, second = load_model(base, base_pretrained), load_model(tuned, tuned_pretrained)
    layers = project_model(
        first.model, second.model.state_dict(), adapter.name, **adapter.place(), **adapter.options
    )
    save_adapter(first.model, output, base_model=first.label, force=force)
    context = {
        "base": first.label,
        "tuned": second.label,
        "adapter": adapter.name,
        "options": adapter.options,
    }
    return ProjectResult(output, layers, context)
