"""The matrix benchmark: which method follows which spectrum, trained and at best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vlkr.adapters.base import Adapter
from vlkr.approximation.fit import Recipe, fit
from vlkr.approximation.measures import LEADING, approximation_measures, frobenius
from vlkr.approximation.methods import Method, optimum
from vlkr.approximation.report import Row
from vlkr.approximation.targets import target_maker
from vlkr.errors import VlkrError
from vlkr.functional import Decomposition, decompose
from vlkr.runtime import progress_bar

#: on a CPU, seeds of larger matrices are faster one after the other: their temporaries stay cached.
BATCHED_NUMEL = 2**16


def approximate_one(
    target: str,
    method: Method,
    adapters: Sequence[Adapter],
    matrices: Sequence[Tensor],
    expected: Sequence[Decomposition],
    recipe: Recipe,
) -> Row:
    """One method on one target, for seeds that are trained side by side.

    Args:
        target: its name.
        method: its name and size.
        adapters: with initial factors, one a seed.
        matrices: the target, one a seed.
        expected: their decompositions.
        recipe: how to train; with no iterations there is only the closed form.

    Raises:
        VlkrError: if training diverges.
    """
    optima = []
    for adapter, matrix in zip(adapters, matrices, strict=True):
        best = optimum(adapter, matrix)
        if best is not None:
            optima.append(frobenius(best - matrix) / frobenius(matrix))
    trained: list[dict[str, float]] = []
    spectrum: list[float] | None = None
    if recipe.iterations > 0:
        changes = fit(adapters, torch.stack(tuple(matrices)), recipe)
        if not torch.isfinite(changes).all():
            raise VlkrError(f"{method.name} diverged on {target}; a smaller --lr may help")
        for change, matrix, known in zip(changes, matrices, expected, strict=True):
            found = decompose(change, LEADING)
            trained.append(approximation_measures(change, matrix, found, known))
            spectrum = spectrum or found.sigma.tolist()
    return Row(target, method.name, method.parameters, method.options, trained, optima, spectrum)


def synthetic(name: str, rows: int, columns: int, seeds: int) -> list[Tensor]:
    """A synthetic target, ``(rows, columns)``, one a seed."""
    make = target_maker(name)
    return [make(rows, columns, torch.Generator().manual_seed(s)) for s in range(1, seeds + 1)]


def unit_scale(name: str, weight: Tensor) -> Tensor:
    """The weight with a mean square of 1, as the synthetic targets have and the recipe expects."""
    scale = weight.square().mean().sqrt()
    if not (torch.isfinite(scale) and scale > 0):
        raise VlkrError(f"{name} is zero or not finite; there is nothing to approximate")
    return weight / scale


def in_threads(
    jobs: Iterable[tuple[Callable[..., None], tuple[Any, ...]]], workers: int, title: str
) -> None:
    """Runs jobs side by side, each in one thread: faster than threads within operations."""
    jobs = list(jobs)
    with (
        progress_bar() as progress,
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        task = progress.add_task(title, total=len(jobs))

        def advance(_: Future[None]) -> None:
            progress.advance(task)

        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        try:
            for future in futures:
                future.add_done_callback(advance)
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
