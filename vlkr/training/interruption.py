"""Ctrl-C, SIGTERM and SLURM's signal: training ends between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from vlkr.errors import VlkrError

_GRACE = 8.0
"""Seconds until a step or a validation that does not end is broken off."""


class StoppedError(Exception):
    """Training was interrupted and its checkpoint written; the message tells how to go on."""


class Interruption(Callback):
    """Waits for the end of a step, writes a checkpoint there and raises :class:`StoppedError`.

    What is interrupted within a step is an optimizer or a file half-way through its work, and what
    a checkpoint of that would hold. A second Ctrl-C, or a step of more than 8 s, raises
    :class:`KeyboardInterrupt` at once. On a SLURM cluster (as Lightning detects it) SIGUSR1, which
    ``sbatch --signal=SIGUSR1@90`` sends ahead of the time limit, also puts the job into the queue
    again. All processes of a run stop behind the same step.

    Args:
        checkpoint: where the trainer keeps it.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received: signal.Signals | None = None
        self.has_started = False
        self.trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals over from Lightning, which gives them back to whom they belonged."""
        self.has_started = True
        self.trainer = trainer
        if trainer.received_sigterm:
            self.received = signal.SIGTERM
        if threading.current_thread() is not threading.main_thread():
            return
        requeue = [signal.SIGUSR1] if SLURMEnvironment.detect() else []
        for number in (signal.SIGINT, signal.SIGTERM, *requeue):
            signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, signal.default_int_handler)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops behind an epoch, whose checkpoint is written."""
        if self._is_to_stop(trainer):
            raise StoppedError(self.resume_hint(trainer.current_epoch))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops behind an optimizer step, unless the epoch ends here with a checkpoint anyway."""
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not self._is_to_stop(trainer) or not is_step or trainer.is_last_batch:
            return
        self._rest()
        trainer.save_checkpoint(self.checkpoint)
        raise StoppedError(self.resume_hint(trainer.current_epoch, batch_idx + 1))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the alarm off."""
        self._rest()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Takes the alarm off."""
        self._rest()

    def resume_hint(self, epochs: int, batches: int = 0) -> str:
        """What the checkpoint holds and which option goes on from it."""
        if not self.checkpoint.is_file():
            return "no epoch was finished, start again with --force"
        held = f"{epochs} epoch{'' if epochs == 1 else 's'}"
        held += f" and {batches} batch{'' if batches == 1 else 'es'}" if batches else ""
        return f"{self.checkpoint.name} holds {held}, --resume goes on from there"

    def requeue(self) -> None:
        """Puts the job into SLURM's queue again, if that was asked for.

        Raises:
            VlkrError: if SLURM does not.
        """
        assert self.trainer is not None
        if self.received is not signal.SIGUSR1 or not self.trainer.is_global_zero:
            return
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise VlkrError(f"cannot put job {job!r} into the queue again: {error}") from error

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signal.Signals(number)
        signal.setitimer(signal.ITIMER_REAL, _GRACE)
        launcher = None if self.trainer is None else self.trainer.strategy.launcher
        if launcher is not None and number != signal.SIGINT:  # which a terminal sends to all
            launcher.kill(number)

    def _is_to_stop(self, trainer: L.Trainer) -> bool:
        received = self.received is not None
        if trainer.world_size == 1:
            return received
        return bool(trainer.strategy.reduce_boolean_decision(received, all=False))

    def _rest(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def add_resume_hint(checkpoint: Path) -> Iterator[None]:
    """Gives an interruption of what comes before and after training its line, too.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, saying how to go on.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        if checkpoint.is_file():
            raise KeyboardInterrupt(
                f"{checkpoint.name} is whole, --resume goes on from there"
            ) from error
        if (checkpoint.parents[1] / "config.yaml").exists():
            raise KeyboardInterrupt("no epoch was finished, start again with --force") from error
        raise KeyboardInterrupt("nothing was written, start it again") from error


def is_requeued() -> bool:
    """Whether SLURM runs this job again, so that the same command is to go on."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
