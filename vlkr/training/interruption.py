"""Graceful interruption by Ctrl-C, SIGTERM or SLURM: training stops between two steps."""

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
"""Seconds that a step or a validation may take to finish before it is aborted."""

_START_OVER = "no epoch was completed; start over with --force"


class StoppedError(Exception):
    """Training was interrupted and its checkpoint written; the message says how to resume."""


class Interruption(Callback):
    """Stops training after a step: writes a checkpoint and raises :class:`StoppedError`.

    Stopping within a step could leave the optimizer or a file half updated. A second Ctrl-C, or a
    step that takes more than 8 s to finish, raises :class:`KeyboardInterrupt` immediately. On a
    SLURM cluster (as detected by Lightning) SIGUSR1, which ``sbatch --signal=SIGUSR1@90`` sends
    before the time limit, also requeues the job. All processes of a run stop after the same step.

    Args:
        checkpoint: path that the trainer writes its checkpoint to.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received: signal.Signals | None = None
        self.has_started = False
        self.trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replaces Lightning's signal handlers; Lightning restores the original ones later."""
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
        """Stops after an epoch, whose checkpoint has been written."""
        if self._should_stop(trainer):
            raise StoppedError(self.resume_hint(trainer.current_epoch))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops after an optimizer step, unless the epoch ends with it and writes a checkpoint."""
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not self._should_stop(trainer) or not is_step or trainer.is_last_batch:
            return
        self._cancel_alarm()
        trainer.save_checkpoint(self.checkpoint)
        raise StoppedError(self.resume_hint(trainer.current_epoch, batch_idx + 1))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cancels the alarm."""
        self._cancel_alarm()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Cancels the alarm."""
        self._cancel_alarm()

    def resume_hint(self, epochs: int, batches: int = 0) -> str:
        """Returns what the checkpoint holds and which option continues from it."""
        if not self.checkpoint.is_file():
            return _START_OVER
        progress = f"{epochs} epoch{'' if epochs == 1 else 's'}"
        progress += f" and {batches} batch{'' if batches == 1 else 'es'}" if batches else ""
        return f"{self.checkpoint.name} holds {progress}; --resume continues from there"

    def requeue(self) -> None:
        """Requeues the job if SLURM's signal was received; :class:`VlkrError` if that fails."""
        assert self.trainer is not None
        if self.received is not signal.SIGUSR1 or not self.trainer.is_global_zero:
            return
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise VlkrError(f"cannot requeue job {job!r}: {error}") from error

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signal.Signals(number)
        signal.setitimer(signal.ITIMER_REAL, _GRACE)
        launcher = None if self.trainer is None else self.trainer.strategy.launcher
        if launcher is not None and number != signal.SIGINT:  # terminals send SIGINT to all
            launcher.kill(number)

    def _should_stop(self, trainer: L.Trainer) -> bool:
        received = self.received is not None
        if trainer.world_size == 1:
            return received
        return bool(trainer.strategy.reduce_boolean_decision(received, all=False))

    def _cancel_alarm(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def add_resume_hint(checkpoint: Path) -> Iterator[None]:
    """Says in a :class:`KeyboardInterrupt` before or after training how to continue the run."""
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        if checkpoint.is_file():
            raise KeyboardInterrupt(
                f"{checkpoint.name} is complete; --resume continues from there"
            ) from error
        if (checkpoint.parents[1] / "config.yaml").exists():
            raise KeyboardInterrupt(_START_OVER) from error
        raise KeyboardInterrupt("nothing was written; start the run again") from error


def is_requeued() -> bool:
    """Returns whether SLURM has requeued this job, in which case the same command resumes."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
