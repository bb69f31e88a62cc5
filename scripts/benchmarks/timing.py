"""Interleaved timing in one process: candidates run in turn, ratios are taken in pairs."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

CLOCKS = ("wall", "processor")


def interleave(
    candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Runs the candidates in turn, ``rounds`` times.

    Returns:
        Seconds of each round, by candidate.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def interleave_clocks(
    candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, dict[str, list[float]]]:
    """:func:`interleave`, by the clock and by the processor.

    Returns:
        By each of ``CLOCKS``, seconds of each round by candidate. Those of the processor are this
        process's and those of processes that it started and that have ended.
    """
    used: dict[str, list[float]] = {name: [] for name in candidates}

    def counted(name: str) -> Callable[[], None]:
        def run() -> None:
            before = processor_seconds()
            candidates[name]()
            used[name].append(processor_seconds() - before)

        return run

    wall = interleave({name: counted(name) for name in candidates}, rounds, warmup)
    processor = {name: seconds[warmup:] for name, seconds in used.items()}
    return dict(zip(CLOCKS, (wall, processor), strict=True))


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_memory(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """MiB that each candidate allocates at its peak beyond what lay there; empty without CUDA."""
    if not torch.cuda.is_available():
        return {}
    peaks: dict[str, float] = {}
    for name, run in candidates.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return peaks


def median_ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Median over rounds of the ratio of two candidates in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_report(
    title: str, rows: list[list[str]], figures: dict[str, object], output: Path
) -> None:
    """Prints a Markdown table and writes it and the figures beside each other."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    facts = ", ".join(f"{key} {value}" for key, value in machine().items() if value)
    text = f"# {title}\n\n" + "\n".join(lines) + f"\n\n{facts}\n"
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(text)
    (output / "results.json").write_text(
        json.dumps({"machine": machine(), **figures}, indent=2) + "\n"
    )
