"""The command ``vlkr adapt``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.models.names import absolute_names
from vlkr.reporting.table import show

if TYPE_CHECKING:
    from vlkr.evaluation.report import Evaluation
    from vlkr.models.clip import ClipBundle


@dataclass
class AdaptResult:
    """What came out of a run.

    Attributes:
        output: the run folder.
        bundle: the model with trained adapters.
        evaluation: on the home test split.
        parameters: trained ones.
        seconds: of training.
    """

    output: Path
    bundle: ClipBundle
    evaluation: Evaluation
    parameters: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The run's ``metrics.json``."""
        return self.evaluation.to_json() | {"train_seconds": round(self.seconds, 1)}

    def show(self, console: Console) -> None:
        """Prints the accuracy at home and where the run lies."""
        show(self.evaluation, console)
        console.print(
            f"{self.parameters:,} parameters trained in {self.seconds:.0f} s. Run: {self.output}",
            highlight=False,
            markup=False,
        )


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
    """Adapts a CLIP model to a few labelled images per class and writes a run folder.

    The folder holds the resolved ``config.yaml``, ``adapter/``, ``metrics.json``, ``report.md``,
    ``logs/`` (CSV and TensorBoard) and ``checkpoints/last.ckpt``, written after each epoch. The
    adapter is that of the last iteration.

    Args:
        output: the run folder.
        model: ``tiny``, an open_clip name, ``hf-hub:org/repo``, ``local-dir:/path``, or
            ``timm:NAME`` for an image encoder that learns its classes from the shots.
        pretrained: open_clip's tag or a path of weights.
        adapter: method and targets.
        data: dataset, shots and batches.
        optimizer: learning rate and its kin.
        trainer: epochs, precision and device.
        seed: of the split, the initial factors, the order and the augmentation.
        resume: go on from ``checkpoints/last.ckpt`` of an interrupted run; a job that SLURM runs
            again does so by itself.
        force: write into a folder that holds something.

    Raises:
        VlkrError: for any option that does not make sense, before anything is written.
    """
    from vlkr.adapters.registry import adapter_class
    from vlkr.evaluation.evaluate import evaluate_model
    from vlkr.models.loading import load_model
    from vlkr.runs import RunConfig, RunFolder, is_first_process
    from vlkr.training.interruption import add_resume_hint, is_requeued
    from vlkr.training.recipe import train

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
