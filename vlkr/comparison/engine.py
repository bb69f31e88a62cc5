"""Computing the cells of a plan: here, in processes side by side, or on a cluster."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from vlkr.comparison.plan import Cell, Plan
from vlkr.comparison.results import ERROR, RESULT, is_finished, write_error
from vlkr.errors import VlkrError
from vlkr.files import check_free, read_json, write_json

PLAN, CELLS = "plan.json", "cells"


@dataclass(frozen=True)
class CellsDone:
    """What ``--cell`` computed.

    Attributes:
        cells: ids, and how each of them stands.
        output: folder of the grid.
    """

    cells: dict[str, str]
    output: Path

    def to_json(self) -> dict[str, Any]:
        """The cells."""
        return {"cells": self.cells}

    def show(self, console: Console) -> None:
        """Prints a line a cell."""
        for cell, state in self.cells.items():
            console.print(f"{cell}: {state}", highlight=False, markup=False)


def cell_folder(output: Path, cell: str) -> Path:
    """Where a cell lies."""
    return output / CELLS / cell


def state(output: Path, cell: str) -> str:
    """``finished``, ``failed: ...`` or ``not finished``."""
    folder = cell_folder(output, cell)
    if (folder / RESULT).is_file():
        return "finished"
    if (folder / ERROR).is_file():
        return f"failed: {read_json(folder / ERROR)['message']}"
    return "not finished"


def run_plan(
    plan: Plan, output: Path, *, jobs: int = 1, launcher: str = "local", force: bool = False
) -> None:
    """Computes all cells that are not finished; those that fail leave a note of it.

    Args:
        plan: what to compute.
        output: folder of the grid; gets ``plan.json`` and a folder a cell.
        jobs: processes; 0 computes nothing.
        launcher: ``local`` or a scheduler's command.
        force: compute cells again whose configuration has changed.

    Raises:
        VlkrError: if the folder holds something else, or cells of another configuration.
        KeyboardInterrupt: on Ctrl-C, saying how to go on.
    """
    if not (output / PLAN).is_file():
        check_free(output, hint="name the folder of an earlier grid")
    left = []
    for cell in plan.cells:
        folder = cell_folder(output, cell.id)
        try:
            finished = is_finished(folder, cell)
        except VlkrError:
            if not force:
                raise
            (folder / RESULT).unlink()
            finished = False
        if not finished:
            left.append(cell)
    write_json(
        output / PLAN,
        {"command": plan.command, "cells": [cell.to_json() for cell in plan.cells]},
    )
    if jobs == 0 or not left:
        return
    for cell in left:
        (cell_folder(output, cell.id) / ERROR).unlink(missing_ok=True)
    try:
        if launcher != "local":
            _launch(plan.command, left, output, jobs, launcher)
        elif jobs == 1:
            _run_here(left, output)
        else:
            _run_beside(plan.command, left, output, min(jobs, len(left)))
    except KeyboardInterrupt as error:
        done = sum(state(output, cell.id) == "finished" for cell in plan.cells)
        raise KeyboardInterrupt(
            f"{done} of {len(plan.cells)} cells are finished, the same command goes on from there"
        ) from error


def run_cells(output: Path, ids: Sequence[str]) -> CellsDone:
    """Computes cells of a plan on disk: what other processes and a cluster's jobs do.

    Args:
        output: folder of the grid.
        ids: of the cells, or ``all`` for every one that is neither finished, nor failed, nor
            computed by another process.

    Raises:
        VlkrError: for a folder without a plan, an unknown cell, or one that was named and failed.
    """
    from vlkr.comparison.cell import forget_model, run_cell

    path = output / PLAN
    if not path.is_file():
        raise VlkrError(f"no plan in {output}; start without --cell first")
    found = {cell["id"]: cell for cell in read_json(path)["cells"]}
    for name in ids:
        if name not in found and name != "all":
            raise VlkrError(f"no cell {name!r} in {path}, expected one such as {next(iter(found))}")
    every = "all" in ids
    chosen = list(found) if every else list(ids)
    for name in chosen:
        if not every or state(output, name) == "not finished":
            run_cell(Cell.from_json(found[name]), cell_folder(output, name))
    forget_model()
    done = {name: state(output, name) for name in chosen}
    failed = [f"cell {name} {text}" for name, text in done.items() if text.startswith("failed")]
    if failed and not every:
        raise VlkrError(failed[0])
    return CellsDone(done, output)


def _run_here(cells: Sequence[Cell], output: Path) -> None:
    from vlkr.comparison.cell import forget_model, run_cell  # a report needs none of it

    console = Console(stderr=True)
    started = time.perf_counter()
    for i, cell in enumerate(cells):
        each = (time.perf_counter() - started) / i if i else None
        rest = f", about {_duration(each * (len(cells) - i))} left" if each is not None else ""
        console.print(f"cell {i + 1} of {len(cells)}{rest}: [bold]{cell.id}[/]", highlight=False)
        run_cell(cell, cell_folder(output, cell.id))
        if (text := state(output, cell.id)).startswith("failed"):
            console.print(f"cell {cell.id} {text}", style="red", highlight=False, markup=False)
    forget_model()


def _duration(seconds: float) -> str:
    """Minutes, or seconds where there are few.

    >>> _duration(30), _duration(600)
    ('30 s', '10 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _command(command: str, output: Path, cell: str) -> list[str]:
    return [sys.executable, "-m", "vlkr", command, "--output", str(output), "--cell", cell]


def _run_beside(command: str, cells: Sequence[Cell], output: Path, jobs: int) -> None:
    """Processes that take cells in turn; one that dies is replaced, and its cell has failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    logs = output / "logs"
    logs.mkdir(exist_ok=True)
    with ExitStack() as stack:

        def start(number: int) -> subprocess.Popen[bytes]:
            log = stack.enter_context((logs / f"process-{number}.log").open("ab"))
            return subprocess.Popen(
                _command(command, output.resolve(), "all"),
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

        progress = stack.enter_context(_progress())
        task = progress.add_task("cells", total=len(cells))
        processes = {number: start(number) for number in range(1, jobs + 1)}
        stack.callback(lambda: _stop(processes.values()))
        while processes:
            time.sleep(0.2)
            for number, process in list(processes.items()):
                if process.poll() is None:
                    continue
                del processes[number]
                if process.returncode != 0:
                    log = logs / f"process-{number}.log"
                    if not _blame(cells, output, process, log):
                        raise VlkrError(f"a process could not start, see {log}")
                    processes[number] = start(number)
            states = [state(output, cell.id) for cell in cells]
            progress.update(task, completed=len(states) - states.count("not finished"))


def _blame(
    cells: Sequence[Cell], output: Path, process: subprocess.Popen[bytes], log: Path
) -> bool:
    """Records the failure of the cell that a process was at; False if there was none."""
    for cell in cells:
        folder = cell_folder(output, cell.id)
        owner = folder / "pid"
        if owner.is_file() and owner.read_text().strip() == str(process.pid):
            code = process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            write_error(folder, "ProcessDied", f"its process ended with {how}, see {log}")
            owner.unlink()
            return True
    return False


def _stop(processes: Sequence[subprocess.Popen[bytes]] | Any) -> None:
    """Asks processes to end, and kills those that do not."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _launch(command: str, cells: Sequence[Cell], output: Path, jobs: int, launcher: str) -> None:
    """Hands every cell's command to the launcher, ``jobs`` at a time."""

    def submit(cell: Cell) -> None:
        own = shlex.join(_command(command, output.resolve(), cell.id))
        arguments = [
            word.replace("{command}", own).replace("{cell}", cell.id)
            for word in shlex.split(launcher)
        ]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True)
            reason = done.stderr.strip() or done.stdout.strip()
            failed = done.returncode != 0
        except OSError as error:
            failed, reason = True, f"{arguments[0]}: {error.strerror}"
        if failed and state(output, cell.id) == "not finished":
            write_error(cell_folder(output, cell.id), "LauncherFailed", reason[-2000:])

    _in_parallel(submit, cells, jobs)


def _in_parallel(function: Callable[[Cell], None], cells: Sequence[Cell], jobs: int) -> None:
    with _progress() as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("cells", total=len(cells))
        futures = [pool.submit(function, cell) for cell in cells]
        try:
            for future in futures:
                future.add_done_callback(lambda _: progress.advance(task))
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _progress() -> Progress:
    return Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
