"""Builds and runs Lightning's trainer, and seals its checkpoints with a checksum."""

from __future__ import annotations

import hashlib
import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vlkr.config import TrainerConfig
from vlkr.errors import VlkrError
from vlkr.files import atomic_file
from vlkr.runs import RunFolder
from vlkr.runtime import quiet
from vlkr.training.interruption import Interruption, StoppedError

# A zip archive ends with the length of its comment, in two bytes, and the comment.
_MARK = b"sha256:"
_LENGTH = len(_MARK) + 2 * hashlib.sha256().digest_size
# Raised by Lightning and torch for a checkpoint of an unexpected structure.
_RESTORE_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    MisconfigurationException,
    RuntimeError,
    TypeError,
    ValueError,
)


class _ProgressBar(RichProgressBar):
    """A progress bar without the logger's version number."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def make_trainer(folder: RunFolder, options: TrainerConfig, grad_clip: float) -> L.Trainer:
    """Returns a trainer that logs to a run folder and writes its checkpoint after each epoch.

    Args:
        folder: run folder; nothing is written before training starts.
        options: epochs, precision and devices.
        grad_clip: largest gradient norm, 0 for none.

    Raises:
        VlkrError: for a device or precision that is not available.
    """
    callbacks: list[Callback] = [
        ModelCheckpoint(
            dirpath=folder.checkpoint.parent,
            filename=folder.checkpoint.stem,
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
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy="auto" if options.devices * options.num_nodes == 1 else "ddp",
            accumulate_grad_batches=options.accumulate_grad_batches,
            gradient_clip_val=grad_clip or None,
            callbacks=callbacks,
            plugins=[SealedCheckpoints()],
            logger=[
                CSVLogger(folder.log_dir, name="", version="csv"),
                TensorBoardLogger(folder.log_dir, name="", version="tensorboard"),
            ],
            # Lightning looks for SLURM checkpoints here; a fresh run empties the folder.
            default_root_dir=folder.checkpoint.parent,
            enable_progress_bar=options.progress,
            enable_model_summary=False,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise VlkrError(
            f"trainer.accelerator {options.accelerator!r} with trainer.precision "
            f"{options.precision!r} on {options.devices} device(s) is not possible here: {error}"
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

    Args:
        trainer: returned by :func:`make_trainer`.
        module: model to train.
        datamodule: training and validation data.
        checkpoint: path that the trainer writes its checkpoint to.
        resume: continue from the checkpoint, which has been checked already.

    Raises:
        VlkrError: if the checkpoint has an unexpected structure.
        KeyboardInterrupt: on Ctrl-C, SIGTERM or SLURM's signal, saying how to resume.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    interruption = Interruption(checkpoint)
    trainer.callbacks.insert(0, interruption)  # type: ignore[attr-defined]
    try:
        trainer.fit(
            module,
            datamodule=datamodule,
            ckpt_path=str(checkpoint) if resume else None,
            weights_only=True,
        )
    except StoppedError as error:
        interruption.requeue()
        raise KeyboardInterrupt(str(error)) from error
    except SystemExit as error:  # raised by Lightning for an interruption within a step
        signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves it ignored
        raise KeyboardInterrupt(interruption.resume_hint(trainer.current_epoch)) from error
    except _RESTORE_ERRORS as error:
        if isinstance(error, VlkrError) or not resume or interruption.has_started:
            raise
        raise VlkrError(
            f"{checkpoint} is damaged: {type(error).__name__} {' '.join(str(error).split())}"
        ) from error
    if interruption.received is not None:
        raise KeyboardInterrupt(interruption.resume_hint(trainer.current_epoch))


# Advice about hardware and workers that a user of the command line cannot act on.
_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_WARNINGS = (
    ".*module.s. in eval mode at the start",
    "Detected call of .lr_scheduler.step",  # loss scaling may skip the first step
    ".*LeafSpec.* is deprecated",
    ".*does not have many workers.*",
    "Total length of `list` across ranks is zero",
    ".*AMP with fp16 is not supported on CPU",
    "Checkpoint directory .* exists and is not",
    "Experiment logs directory .* exists and is",
    "The dirpath has changed from",  # a run folder that was moved; its checkpoint is found
)


def quiet_lightning() -> AbstractContextManager[None]:
    """Silences Lightning's advice about hardware and workers."""
    return quiet(*_LOGGERS, ignore=_WARNINGS)


class SealedCheckpoints(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically, with their SHA-256 as the zip comment.

    Lightning itself writes to the system's temporary folder first, possibly on a different disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes ``checkpoint`` to ``path`` atomically."""
        with atomic_file(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
            with temporary.open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(_LENGTH.to_bytes(2, "little") + _MARK + digest.encode())


def check_checkpoint(path: Path) -> None:
    """Raises :class:`VlkrError` for a checkpoint that is damaged, or is not tensors and numbers.

    Args:
        path: written by :class:`SealedCheckpoints`.
    """
    try:
        content = path.read_bytes()
        seal = content[-_LENGTH:]
        length = content[-_LENGTH - 2 : -_LENGTH]
        if length != _LENGTH.to_bytes(2, "little") or not seal.startswith(_MARK):
            raise VlkrError(f"{path} is damaged: it does not end with its SHA-256")
        digest = hashlib.sha256(content[: -_LENGTH - 2] + bytes(2)).hexdigest()
        if seal.removeprefix(_MARK) != digest.encode():
            raise VlkrError(f"{path} is damaged: its SHA-256 is {digest[:12]}..., not as written")
        torch.load(path, map_location="cpu", weights_only=True)
    except VlkrError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VlkrError(f"{path} is damaged: {reason}") from error
