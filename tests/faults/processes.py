"""Commands in processes of their own that start at once, to be killed."""

import io
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PRELOADED = (
    "faults.processes",
    "tensorboard.summary.writer",
    "vlkr.cli",
    "vlkr.comparison.compare",
    "vlkr.comparison.dg",
    "vlkr.comparison.transfer",
    "vlkr.datasets.packing",
    "vlkr.evaluation.evaluate",
    "vlkr.export.export",
    "vlkr.export.open_clip",
    "vlkr.export.parity",
    "vlkr.training.recipe",
)
LIMIT = 300
"""Seconds after which a process that has not ended counts as hanging."""


def run_command(arguments, stderr, environment):
    """In the child: a command of the command line, its stderr in a file."""
    import torch

    from vlkr.cli import main

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a command that is started plainly
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Path(stderr).open("w") as file:  # from now on it is killed
            os.dup2(file.fileno(), 2)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = main(arguments)
    except KeyboardInterrupt:  # before or behind the command
        print("vlkr: interrupted", file=sys.stderr)
        code = 130
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        code: exit status, negative for a signal's number.
        stderr: what it wrote there.
        seconds: from the signal to its end; from start to end without a signal.
    """

    code: int
    stderr: str
    seconds: float


class Server:
    """One process with everything imported, from which commands are forked."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOADED))

    def start(self, arguments, stderr, **environment):
        """Starts ``vlkr ARGUMENTS``."""
        Path(stderr).unlink(missing_ok=True)
        process = self.context.Process(
            target=run_command, args=([str(a) for a in arguments], str(stderr), environment)
        )
        process.start()
        while not Path(stderr).exists() and process.is_alive():
            time.sleep(0.005)
        return process

    def run(self, arguments, stderr, **environment):
        """Runs ``vlkr ARGUMENTS`` to its end."""
        return self.end(self.start(arguments, stderr, **environment), stderr)

    def kill_after(self, seconds, number, arguments, stderr, **environment):
        """Starts a command and sends it a signal, if it has not ended by then."""
        process = self.start(arguments, stderr, **environment)
        process.join(seconds)
        return self.end(process, stderr, number if process.is_alive() else None)

    def end(self, process, stderr, number=None):
        """Sends a signal, if there is one, and waits for the end."""
        start = time.monotonic()
        if number is not None:
            os.kill(process.pid, number)
        process.join(LIMIT)
        seconds = time.monotonic() - start
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            raise AssertionError(f"still running after {LIMIT} s: {Path(stderr).read_text()}")
        code = process.exitcode
        process.close()
        return Ended(code, Path(stderr).read_text(), seconds)
