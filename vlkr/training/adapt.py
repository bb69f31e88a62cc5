"""The few-shot recipe: from names and options to a run folder with a trained adapter."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from vlkr.adapters import (
    adapter_parameters,
    add_adapters,
    find_targets,
    match_budget,
    save_adapter,
)
from vlkr.adapters.registry import adapter_class
from vlkr.datasets import DataOptions, FewShotDataModule
from vlkr.datasets.pipelines import train_transform
from vlkr.errors import VlkrError
from vlkr.evaluation.report import Evaluation, evaluation_markdown
from vlkr.evaluation.zero_shot import evaluate_bundle
from vlkr.files import check_free, write_json, write_text
from vlkr.models.clip import ClipBundle, image_size, load_clip
from vlkr.training.module import FewShotModule
from vlkr.training.optim import OptimizerOptions


@dataclass(frozen=True)
class AdapterOptions:
    """The adapter of a run.

    Args:
        name: of the method, ``kradapter`` or ``lora``.
        targets: short names (``q k v qkv out fc1 fc2``) or shell patterns of module names.
        towers: ``visual``, ``text`` or both.
        blocks: indices of transformer blocks, negative from the end; none takes all.
        options: of the method, e.g. ``{rank: 8}``.
        match: a method whose parameter count is to be met by choosing this one's size.
    """

    name: str = "kradapter"
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out", "fc1", "fc2"])
    towers: list[str] = field(default_factory=lambda: ["visual", "text"])
    blocks: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    match: str | None = None

    def place(self) -> dict[str, Any]:
        """Where the adapters go, as keyword arguments of :func:`vlkr.add_adapters`."""
        return {"targets": tuple(self.targets), "towers": tuple(self.towers), "blocks": self.blocks}


@dataclass(frozen=True)
class TrainerOptions:
    """How long and where to train.

    Args:
        epochs: passes over the (oversampled) training images.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        accelerator: ``auto``, ``cpu``, ``gpu``, as Lightning's Trainer names them.
        accumulate_grad_batches: batches per optimizer step.
        progress: show a progress bar.
    """

    epochs: int = 10
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: str = "auto"
    accumulate_grad_batches: int = 1
    progress: bool = True


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
    adapter: AdapterOptions = AdapterOptions(),
    data: DataOptions = DataOptions(),
    optimizer: OptimizerOptions = OptimizerOptions(),
    trainer: TrainerOptions = TrainerOptions(),
    seed: int = 1,
    resume: bool = False,
    force: bool = False,
) -> AdaptResult:
    """Adapts a CLIP model to a few labelled images per class and writes a run folder.

    The folder holds the resolved ``config.yaml``, ``adapter/``, ``metrics.json``, ``report.md``,
    ``logs/`` (CSV and TensorBoard) and ``checkpoints/last.ckpt``. The adapter is that of the last
    iteration.

    Args:
        output: the run folder.
        model: ``tiny``, an open_clip name, ``hf-hub:org/repo`` or ``local-dir:/path``.
        pretrained: open_clip's tag or a path of weights.
        adapter: method and targets.
        data: dataset, shots and batches.
        optimizer: learning rate and its kin.
        trainer: epochs, precision and device.
        seed: of the split, the initial factors, the order and the augmentation.
        resume: go on from ``checkpoints/last.ckpt`` of an interrupted run.
        force: write into a folder that holds something.

    Raises:
        VlkrError: for any option that does not make sense, before anything is written.
    """
    checkpoint = output / "checkpoints" / "last.ckpt"
    optimizer.check()
    adapter_class(adapter.name)
    if trainer.epochs < 1:
        raise VlkrError(f"trainer.epochs {trainer.epochs} is too small, expected at least 1")
    if resume and not checkpoint.is_file():
        raise VlkrError(f"nothing to resume: no {checkpoint}")
    if not resume:
        check_free(output, force=force, hint="--resume goes on with it, --force overwrites it")
    dataset = data.load()
    dataset.source("test")
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).resolve())
    bundle = load_clip(model, pretrained)
    L.seed_everything(seed, workers=True, verbose=False)
    options, place = dict(adapter.options), adapter.place()
    if adapter.match is not None:
        budget = match_budget(adapter.name, bundle.model, adapter.match, **place, **options)
        options = budget.options
    config = {
        "model": model,
        "pretrained": pretrained,
        "adapter": {**asdict(adapter), "options": options, "match": None},
        "data": _plain(asdict(data)),
        "optimizer": asdict(optimizer),
        "trainer": asdict(trainer),
        "seed": seed,
    }
    if resume:
        _check_same_config(output / "config.yaml", config)
    find_targets(bundle.model, **place)
    datamodule = FewShotDataModule(
        dataset, data, seed, _train_transform(bundle, data), bundle.preprocess
    )
    add_adapters(bundle.model, adapter.name, **place, **options)
    module = FewShotModule(bundle, dataset.class_names, dataset.templates, optimizer, seed)
    write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    started = time.perf_counter()
    with _quiet_lightning():
        fit = _trainer(output, trainer, optimizer)
        fit.fit(
            module,
            datamodule=datamodule,
            ckpt_path=str(checkpoint) if resume else None,
            weights_only=True,
        )
    if fit.interrupted:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    bundle.model.to("cpu").eval()
    save_adapter(bundle.model, output / "adapter", base_model=bundle.label, force=True)
    evaluation = evaluate_bundle(
        bundle, [dataset], batch_size=128, num_workers=data.num_workers, device="auto"
    )
    evaluation.context |= {
        "adapter": adapter.name,
        "options": options,
        "parameters": sum(p.numel() for p in adapter_parameters(bundle.model)),
        "shots": data.shots,
        "seed": seed,
        "checkpoint": "last iteration",
    }
    result = AdaptResult(output, bundle, evaluation, evaluation.context["parameters"], seconds)
    write_json(output / "metrics.json", result.to_json())
    write_text(output / "report.md", evaluation_markdown(evaluation))
    return result


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    root = data["root"]
    return {
        **data,
        "root": str(Path(root).resolve()) if root else None,
        "crop_scale": list(data["crop_scale"]),
    }


def _train_transform(bundle: ClipBundle, data: DataOptions) -> Any:
    cfg = bundle.preprocess_cfg
    return train_transform(
        image_size(bundle),
        cfg["mean"],
        cfg["std"],
        cfg["interpolation"],
        data.crop_scale,
        data.flip,
    )


def _check_same_config(path: Path, config: dict[str, Any]) -> None:
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in config.items():
        if before.get(key) != value and key != "trainer":
            raise VlkrError(
                f"cannot resume: {key} is {value} now and was {before.get(key)} in {path}"
            )


class _ProgressBar(RichProgressBar):
    """Without the logger's version number."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def _trainer(output: Path, options: TrainerOptions, optimizer: OptimizerOptions) -> L.Trainer:
    callbacks: list[Callback] = [
        ModelCheckpoint(
            dirpath=output / "checkpoints", save_last=True, save_top_k=0, every_n_epochs=1
        )
    ]
    if options.progress:
        callbacks.append(_ProgressBar(console_kwargs={"stderr": True}))
    return L.Trainer(
        max_epochs=options.epochs,
        precision=options.precision,
        accelerator=options.accelerator,
        devices=1,
        accumulate_grad_batches=options.accumulate_grad_batches,
        gradient_clip_val=optimizer.grad_clip or None,
        callbacks=callbacks,
        logger=[
            CSVLogger(output / "logs", name="", version="csv"),
            TensorBoardLogger(output / "logs", name="", version="tensorboard"),
        ],
        default_root_dir=output,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Mutes advice about hardware and workers that a user of the command line cannot follow."""
    loggers = [logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not")
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
