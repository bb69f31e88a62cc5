"""The matrix benchmark: which method follows which spectrum, trained and at best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vlkr.adapters.base import Adapter
from vlkr.approximation.authors import (
    AUTHORS_METHODS,
    AUTHORS_TARGETS,
    authors_method,
    authors_target,
)
from vlkr.approximation.fit import Recipe, fit
from vlkr.approximation.measures import LEADING, approximation_measures, frobenius, target_measures
from vlkr.approximation.methods import DEFAULT_METHODS, Method, budget, optimum, sized_method
from vlkr.approximation.report import Approximation, Row, joined, write_report
from vlkr.approximation.targets import DEFAULT_TARGETS, target_maker, weight_targets
from vlkr.errors import VlkrError
from vlkr.files import check_free
from vlkr.functional import Decomposition, decompose
from vlkr.models.clip import pick_device

#: on a CPU, seeds of larger matrices are faster one after the other: their temporaries stay cached.
_BATCHED_NUMEL = 2**16


def approximate(
    targets: list[str] | None = None,
    methods: list[str] | None = None,
    weights: str | None = None,
    pretrained: str | None = None,
    tensor: str | None = None,
    protocol: Literal["equal-budget", "authors"] = "equal-budget",
    out_features: int = 1024,
    in_features: int = 768,
    num_terms: int = 1,
    seeds: int = 3,
    iterations: int = 300,
    lr: float = 0.1,
    weight_decay: float = 0.01,
    device: str = "auto",
    output: Path | None = None,
    force: bool = False,
) -> Approximation:
    """Approximates matrices of known spectra by adapters, trained and in closed form.

    Args:
        targets: ``gaussian``, ``sparse``, ``whitened``, ``low-rank``, ``high-frequency``,
            ``low-frequency`` (these six by default), ``high-frequency-aliased``,
            ``power-law:EXPONENT``.
        methods: ``lora``, ``sinlora``, ``kradapter``, ``kradapter:balanced``, ``randlora``,
            ``krona``, ``vera``, ``full`` (these by default), any with options such as
            ``kradapter:num_terms=2`` or ``lora:rank=8``.
        weights: a safetensors file or a model whose weights are targets too; alone, the only ones.
        pretrained: open_clip's tag of that model.
        tensor: the weight's name; by default the last text and visual ``in_proj_weight``.
        protocol: ``authors`` takes the published script's targets, methods, sizes and unequal
            budgets; weights are then cut to 1024x768 and not scaled.
        out_features: rows of the synthetic targets.
        in_features: columns.
        num_terms: the budget is a balanced KRAdapter's with this many products; the other methods
            take the size that is nearest to it.
        seeds: targets and initial factors are drawn for each of these many.
        iterations: of training; 0 takes closed forms alone.
        lr: AdamW's learning rate, the published one.
        weight_decay: AdamW's.
        device: ``auto``, ``cpu``, ``cuda``, ...
        output: folder for ``report.md``, ``results.json``, ``errors.png`` and ``spectra.png``.
        force: write into a folder that holds something.

    Raises:
        VlkrError: for a target, method, size or weight that cannot be.
    """
    _check(out_features, in_features, num_terms, seeds, iterations, lr)
    if output is not None:
        check_free(output, force=force)
    place = pick_device(device)
    authors = protocol == "authors"
    if authors and methods is not None:
        raise VlkrError("the authors' protocol has its own methods; leave --methods out")
    if targets is None:
        targets = [] if weights else list(AUTHORS_TARGETS if authors else DEFAULT_TARGETS)
    known = {n: _synthetic(n, out_features, in_features, seeds) for n in targets}
    if weights is not None:
        for name, weight in weight_targets(weights, pretrained, tensor).items():
            scaled = weight[:out_features, :in_features] if authors else _unit_scale(name, weight)
            known[name] = [scaled] * seeds
    if authors:
        known = {name: [authors_target(t) for t in ts] for name, ts in known.items()}
    shapes = {name: (ts[0].shape[1], ts[0].shape[0]) for name, ts in known.items()}
    names = methods or list(AUTHORS_METHODS if authors else DEFAULT_METHODS)
    # An adapter's factors are drawn once for all targets of a shape; training leaves them alone.
    sized = {
        (name, *shape): authors_method(name, *shape)
        if authors
        else sized_method(name, *shape, num_terms)
        for shape in dict.fromkeys(shapes.values())
        for name in names
    }
    adapters = {key: [m.make(seed) for seed in range(1, seeds + 1)] for key, m in sized.items()}
    started = time.perf_counter()
    known = {name: [t.to(place) for t in ts] for name, ts in known.items()}
    decomposed: dict[str, list[Decomposition]] = {}
    parts: dict[tuple[str, str, int], Row] = {}
    recipe = Recipe(iterations, lr, weight_decay)

    def decompose_target(name: str) -> None:
        decomposed[name] = [decompose(t, LEADING) for t in known[name]]

    def run(target: str, name: str, first: int) -> None:
        key = name, *shapes[target]
        chosen = slice(first, first + together[target])
        parts[target, name, first] = approximate_one(
            target,
            sized[key],
            adapters[key][chosen],
            known[target][chosen],
            decomposed[target][chosen],
            recipe,
        )

    together = {
        name: seeds if place.type != "cpu" or math.prod(shape) <= _BATCHED_NUMEL else 1
        for name, shape in shapes.items()
    }
    workers = torch.get_num_threads() if place.type == "cpu" else 1
    jobs = [
        (target, name, first)
        for target in known
        for name in names
        for first in range(0, seeds, together[target])
    ]
    _in_threads([(decompose_target, (name,)) for name in known], workers, "targets")
    _in_threads([(run, job) for job in jobs], workers, "approximating")
    context = {
        "protocol": protocol,
        "seeds": seeds,
        "iterations": iterations,
        "lr": lr,
        "weight_decay": weight_decay,
        "budgets": {name: budget(*shape, num_terms) for name, shape in shapes.items()},
        "weights": weights,
        "device": place.type,
        "threads": workers,
        "seconds_per_seed": round((time.perf_counter() - started) / seeds, 1),
    }
    result = Approximation(
        targets={name: [target_measures(d) for d in ds] for name, ds in decomposed.items()},
        spectra={name: ds[0].sigma.tolist() for name, ds in decomposed.items()},
        rows=joined(parts[job] for job in jobs),
        context=context,
        output=output,
    )
    if output is not None:
        write_report(result, output)
    return result


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


def _check(
    out_features: int, in_features: int, num_terms: int, seeds: int, iterations: int, lr: float
) -> None:
    counts = {
        "out_features": (out_features, 2),
        "in_features": (in_features, 2),
        "num_terms": (num_terms, 1),
        "seeds": (seeds, 1),
        "iterations": (iterations, 0),
    }
    for name, (value, least) in counts.items():
        if value < least:
            raise VlkrError(f"{name} {value} is too small, expected at least {least}")
    if not 0 < lr < math.inf:
        raise VlkrError(f"lr {lr} is out of range, expected a number above 0")


def _synthetic(name: str, rows: int, columns: int, seeds: int) -> list[Tensor]:
    make = target_maker(name)
    return [make(rows, columns, torch.Generator().manual_seed(s)) for s in range(1, seeds + 1)]


def _unit_scale(name: str, weight: Tensor) -> Tensor:
    """The weight with a mean square of 1, as the synthetic targets have and the recipe expects."""
    scale = weight.square().mean().sqrt()
    if not (torch.isfinite(scale) and scale > 0):
        raise VlkrError(f"{name} is zero or not finite; there is nothing to approximate")
    return weight / scale


def _in_threads(
    jobs: Iterable[tuple[Callable[..., None], tuple[Any, ...]]], workers: int, title: str
) -> None:
    """Runs jobs side by side, each in one thread: faster than threads within operations."""
    jobs = list(jobs)
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
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
