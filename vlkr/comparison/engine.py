"""The grid engine: from a plan to its report, in this process, in workers, or on a cluster."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from vlkr.comparison.dry_run import DryRun, dry_run
from vlkr.comparison.methods import check_grid
from vlkr.comparison.options import GridConfig
from vlkr.comparison.plan import Cell, Plan
from vlkr.comparison.report import Report
from vlkr.comparison.results import CellFolder, GridResults, read_results
from vlkr.errors import VlkrError
from vlkr.files import check_free, read_json, write_json
from vlkr.reporting.table import Table
from vlkr.runtime import progress_bar

PLAN = "plan.json"


@dataclass(frozen=True)
class CellStates:
    """What ``--cell`` computed: the state of each cell by its id."""

    exit_code = 0

    cells: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The cells."""
        return {"cells": self.cells}

    def tables(self) -> list[Table]:
        """No table."""
        return []

    def lines(self) -> list[str]:
        """Returns a line per cell."""
        return [f"{cell}: {state}" for cell, state in self.cells.items()]


def run_grid(
    grid: GridConfig,
    output: Path,
    make_plan: Callable[[], Plan],
    make_report: Callable[[GridResults], Report],
) -> Report | CellStates | DryRun:
    """Plans, computes, collects and reports; or does the one part that the options ask for.

    Args:
        grid: options.
        output: folder of the grid.
        make_plan: returns the cells.
        make_report: returns tables and plots of their results.

    Raises:
        VlkrError: for an option or a dataset that cannot be, before anything is written.
    """
    if grid.cell:
        return run_cells(output, grid.cell)
    check_grid(grid)
    plan = make_plan()
    if grid.dry_run:
        return dry_run(plan)
    for eval_set in {repr(s): s for cell in plan.cells for s in cell.sets}.values():
        eval_set.load()
    run_plan(plan, output, jobs=grid.jobs, launcher=grid.launcher, force=grid.force)
    report = make_report(read_results(plan, output))
    report.write()
    return report


def run_plan(
    plan: Plan, output: Path, *, jobs: int = 1, launcher: str = "local", force: bool = False
) -> None:
    """Computes all cells that are not finished; those that fail record why.

    Args:
        plan: what to compute.
        output: folder of the grid; gets ``plan.json`` and a folder per cell.
        jobs: processes; 0 computes nothing.
        launcher: ``local`` or a scheduler's command.
        force: recompute cells whose configuration has changed.

    Raises:
        VlkrError: if the folder holds something else, or cells of a different configuration.
        KeyboardInterrupt: on Ctrl-C, saying how to resume.
    """
    if not (output / PLAN).is_file():
        check_free(output, hint="name the folder of an earlier grid")
    left = []
    for cell in plan.cells:
        folder = CellFolder.of(output, cell.id)
        try:
            finished = folder.is_finished(cell)
        except VlkrError:
            if not force:
                raise
            folder.result.unlink()
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
        CellFolder.of(output, cell.id).error.unlink(missing_ok=True)
    try:
        if launcher != "local":
            _run_by_launcher(plan.command, left, output, jobs, launcher)
        elif jobs == 1:
            _run_here(left, output)
        else:
            _run_in_workers(left, output, min(jobs, len(left)))
    except KeyboardInterrupt as error:
        states = [CellFolder.of(output, cell.id).state for cell in plan.cells]
        raise KeyboardInterrupt(
            f"{states.count('finished')} of {len(states)} cells are finished, the same command "
            "resumes from there"
        ) from error


def run_cells(output: Path, ids: Sequence[str]) -> CellStates:
    """Computes cells of a plan on disk, as the jobs of a cluster do.

    Args:
        output: folder of the grid.
        ids: of the cells, or ``all`` for every one that is neither finished, nor failed, nor
            computed by another process.

    Raises:
        VlkrError: for a folder without a plan, an unknown cell, or a named one that failed.
    """
    from vlkr.comparison.cell import forget_model, run_cell  # imports Lightning

    path = output / PLAN
    if not path.is_file():
        raise VlkrError(f"no plan in {output}; start without --cell first")
    planned = {cell["id"]: cell for cell in read_json(path)["cells"]}
    for name in ids:
        if name not in planned and name != "all":
            example = next(iter(planned))
            raise VlkrError(f"no cell {name!r} in {path}, expected one such as {example}")
    every = "all" in ids
    folders = {name: CellFolder.of(output, name) for name in (planned if every else ids)}
    for name, folder in folders.items():
        if not every or folder.state == "not finished":
            run_cell(Cell.from_json(planned[name]), folder)
    forget_model()
    states = {name: folder.state for name, folder in folders.items()}
    failed = [f"cell {name} {state}" for name, state in states.items() if "failed" in state]
    if failed and not every:
        raise VlkrError(failed[0])
    return CellStates(states)


def _run_here(cells: Sequence[Cell], output: Path) -> None:
    from vlkr.comparison.cell import forget_model, run_cell  # imports Lightning

    console = Console(stderr=True)
    started = time.perf_counter()
    for i, cell in enumerate(cells):
        folder = CellFolder.of(output, cell.id)
        each = (time.perf_counter() - started) / i if i else None
        rest = f", about {_duration(each * (len(cells) - i))} left" if each is not None else ""
        console.print(f"cell {i + 1} of {len(cells)}{rest}: [bold]{cell.id}[/]", highlight=False)
        run_cell(cell, folder)
        if (state := folder.state).startswith("failed"):
            console.print(f"cell {cell.id} {state}", style="red", highlight=False, markup=False)
    forget_model()


def _duration(seconds: float) -> str:
    """Minutes, or seconds where there are few.

    >>> _duration(30), _duration(600)
    ('30 s', '10 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@dataclass
class _Worker:
    """A process that computes the cells that it is sent, one after another."""

    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path
    cell: Cell | None = None

    def send(self, cell: Cell | None, output: Path) -> None:
        """Gives it a cell to compute; None lets it end."""
        self.cell = cell
        with suppress(OSError):  # it has died, which the next wait reports
            self.connection.send(None if cell is None else (cell, CellFolder.of(output, cell.id)))


def _run_in_workers(cells: Sequence[Cell], output: Path, jobs: int) -> None:
    """Gives workers the cells in turn; one that dies is replaced, and its cell has failed."""
    logs = output.resolve() / "logs"
    logs.mkdir(exist_ok=True)
    waiting = deque(cells)
    with progress_bar() as progress, _stopping() as processes:
        task = progress.add_task("cells", total=len(cells))
        numbers = range(1, jobs + 1)
        workers = [_start_worker(n, logs / f"process-{n}.log", processes) for n in numbers]
        busy = {worker.connection: worker for worker in workers}
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker = busy.pop(connection)
                is_alive = True
                try:
                    connection.recv()  # it is ready for a cell
                except (EOFError, OSError):
                    is_alive = False
                    _blame(worker, output)
                progress.advance(task, worker.cell is not None)
                if not is_alive and waiting:
                    worker = _start_worker(worker.number, worker.log, processes)
                    busy[worker.connection] = worker
                elif is_alive:
                    worker.send(waiting.popleft() if waiting else None, output)
                    if worker.cell is not None:
                        busy[connection] = worker


def _start_worker(number: int, log: Path, processes: list[subprocess.Popen[bytes]]) -> _Worker:
    """Starts a plain interpreter, so that nothing of the caller's ``__main__`` is run again."""
    ours, theirs = Pipe()
    with log.open("ab") as file, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as e; e.work({theirs.fileno()})"],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    processes.append(process)
    return _Worker(number, process, ours, log)


def work(descriptor: int) -> None:
    """Computes the cells that come through a pipe, in a process of its own.

    Args:
        descriptor: of the pipe's end.
    """
    from vlkr.comparison.cell import run_cell  # imports Lightning

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Connection(descriptor) as connection, suppress(EOFError, OSError, KeyboardInterrupt):
        connection.send("ready")
        while (task := connection.recv()) is not None:
            run_cell(*task)
            connection.send("ready")
    gc.freeze()  # the process ends at once, without a search for garbage


def _blame(worker: _Worker, output: Path) -> None:
    """Records the failure of the cell that a worker died at."""
    code = worker.process.wait()
    if worker.cell is None:
        raise VlkrError(f"a process could not start, see {worker.log}")
    folder = CellFolder.of(output, worker.cell.id)
    if folder.state == "not finished":
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        folder.fail("ProcessDied", f"its process ended with {how}, see {worker.log}")


@contextmanager
def _stopping() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yields a list for processes; waits for their end, which an error asks of them at once."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _run_by_launcher(
    command: str, cells: Sequence[Cell], output: Path, jobs: int, launcher: str
) -> None:
    """Hands every cell's command to the launcher, ``jobs`` at a time."""
    program = [sys.executable, "-m", "vlkr", command, "--output", str(output.resolve()), "--cell"]

    def submit(cell: Cell) -> None:
        own = shlex.join([*program, cell.id])
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
        folder = CellFolder.of(output, cell.id)
        if failed and folder.state == "not finished":
            folder.fail("LauncherFailed", reason[-2000:])

    with progress_bar() as progress, ExitStack() as stack:
        task = progress.add_task("cells", total=len(cells))
        pool = ThreadPoolExecutor(jobs)
        stack.callback(pool.shutdown, cancel_futures=True)
        for future in as_completed([pool.submit(submit, cell) for cell in cells]):
            future.result()
            progress.advance(task)
