"""Lightning's trainer as the recipe uses it: its options, its files, its silence, its Ctrl-C."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vlkr.errors import VlkrError
from vlkr.files import atomic_file

CHECKPOINT = "checkpoints/last.ckpt"


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

    def check(self) -> None:
        """Raises :class:`VlkrError` for a number out of range."""
        for option in ("epochs", "accumulate_grad_batches"):
            if getattr(self, option) < 1:
                raise VlkrError(
                    f"trainer.{option} {getattr(self, option)} is too small, expected at least 1"
                )


class _ProgressBar(RichProgressBar):
    """Without the logger's version number."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class _AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's own files, renamed from within their folder.

    Lightning writes to the system's temporary folder first, which may lie on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        with atomic_file(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


def make_trainer(output: Path, options: TrainerOptions, grad_clip: float) -> L.Trainer:
    """A trainer that logs to ``output`` and writes its checkpoint there after each epoch.

    Args:
        output: the run folder; nothing is written before training starts.
        options: of the run.
        grad_clip: largest gradient norm, 0 for none.

    Raises:
        VlkrError: for a device or precision that is not there.
    """
    checkpoint = Path(CHECKPOINT)
    callbacks: list[Callback] = [
        ModelCheckpoint(
            dirpath=output / checkpoint.parent,
            filename=checkpoint.stem,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
    ]
    if options.progress:
        callbacks.append(_ProgressBar(console_kwargs={"stderr": True}))
    try:
        trainer = L.Trainer(
            max_epochs=options.epochs,
            precision=options.precision,
            accelerator=options.accelerator,
            devices=1,
            accumulate_grad_batches=options.accumulate_grad_batches,
            gradient_clip_val=grad_clip or None,
            callbacks=callbacks,
            plugins=[_AtomicCheckpoints()],
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
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise VlkrError(
            f"trainer.accelerator {options.accelerator!r} with trainer.precision "
            f"{options.precision!r} is not possible here: {error}"
        ) from error
    if trainer.precision != options.precision:
        raise VlkrError(
            f"trainer.precision {options.precision!r} is not possible on this device, try "
            f"{trainer.precision!r}"
        )
    return trainer


def fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    checkpoint: Path,
    *,
    resume: bool,
) -> None:
    """Trains, from the start or from ``checkpoint``.

    Raises:
        VlkrError: if ``checkpoint`` is damaged.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, saying how to go on.
    """
    if resume:
        try:
            torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise VlkrError(f"{checkpoint} is damaged: {reason}") from error
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            module,
            datamodule=datamodule,
            ckpt_path=str(checkpoint) if resume else None,
            weights_only=True,
        )
    except SystemExit as error:  # Lightning's answer to both
        signal.signal(signal.SIGINT, on_interrupt)  # which Lightning leaves ignored
        epochs = f"{trainer.current_epoch} epoch{'s' if trainer.current_epoch > 1 else ''}"
        raise KeyboardInterrupt(
            f"{checkpoint.name} holds {epochs}, --resume goes on from there"
            if checkpoint.is_file()
            else "no epoch was finished, start again with --force"
        ) from error


@contextmanager
def quiet_lightning() -> Iterator[None]:
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
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not")
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
