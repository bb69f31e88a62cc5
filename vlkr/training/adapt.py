"""The command ``vlkr adapt``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataOptions
from vlkr.errors import VlkrError
from vlkr.files import check_free, exclusive, write_json, write_text
from vlkr.models.names import absolute_names

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
        self.evaluation.show(console)
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
    data: DataOptions = DataOptions(),
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
    from vlkr.evaluation.report import evaluation_markdown
    from vlkr.evaluation.zero_shot import evaluate_bundle
    from vlkr.models.loading import load_model
    from vlkr.runtime import is_first_process
    from vlkr.training.interruption import is_requeued, tells_how_to_go_on
    from vlkr.training.recipe import train
    from vlkr.training.trainer import CHECKPOINT

    is_first = is_first_process()
    checkpoint = output / CHECKPOINT
    optimizer.check()
    trainer.check()
    adapter_class(adapter.name)
    if not 0 <= seed < 2**32:
        raise VlkrError(f"seed {seed} is out of range, expected 0 to {2**32 - 1}")
    resume = resume or (is_requeued() and checkpoint.is_file())
    if resume and not checkpoint.is_file():
        raise VlkrError(f"nothing to resume: no {checkpoint}")
    check_free(
        output,
        force=force or resume or not is_first,
        hint="--resume goes on with it, --force overwrites it",
    )
    dataset = data.load()
    if next(iter(dataset.source("test")), None) is None:
        raise VlkrError(f"dataset {dataset.name!r} has no image in its split 'test'")
    model, pretrained = absolute_names(model, pretrained)
    bundle = load_model(model, pretrained)
    with tells_how_to_go_on(checkpoint), exclusive(output) if is_first else nullcontext():
        training = train(
            output, bundle, dataset, adapter, data, optimizer, trainer, seed, resume=resume
        )
        evaluation = evaluate_bundle(
            bundle, [dataset], batch_size=128, num_workers=data.num_workers, device=training.device
        )
        evaluation.context |= {
            "adapter": adapter.name,
            "options": training.options,
            "parameters": training.parameters,
            **data.context(),
            "training images": training.images,
            "classes per step": data.classes_per_step,
            "seed": seed,
            "checkpoint": "last iteration",
        }
        result = AdaptResult(output, bundle, evaluation, training.parameters, training.seconds)
        if is_first:
            write_json(output / "metrics.json", result.to_json())
            write_text(output / "report.md", evaluation_markdown(evaluation))
    return result
