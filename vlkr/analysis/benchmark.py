"""The matrix benchmark: which method approximates which spectrum, trained and at best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlkr.adapters.base import Adapter
from vlkr.analysis.approximation import Approximation, Row
from vlkr.analysis.fit import Recipe, fit
from vlkr.analysis.matrices import DEFAULT_MATRICES, load_weights, make_matrix, unit_scale
from vlkr.analysis.methods import (
    AUTHORS_MATRICES,
    AUTHORS_METHODS,
    DEFAULT_METHODS,
    Method,
    authors_method,
    authors_rounded,
    budget,
    optimum,
    sized_method,
)
from vlkr.errors import VlkrError
from vlkr.files import check_free
from vlkr.functional import Decomposition, decompose, spectrum_measures, subspace_overlap
from vlkr.runtime import pick_device, progress_bar

#: dimensions of the leading subspaces that are compared.
LEADING = 16
#: on a CPU, seeds of larger matrices are faster one after another: their temporaries stay cached.
BATCHED_NUMEL = 2**16


def frobenius(matrix: Tensor) -> float:
    """Returns the Frobenius norm, summed in fp64 so that close errors can be told apart."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def spectrum_numbers(matrix: Decomposition) -> dict[str, float]:
    """Returns ranks and norms of a matrix."""
    return {name: float(value) for name, value in spectrum_measures(matrix.sigma).items()}


def approximation_measures(
    approximation: Tensor, target: Tensor, spectrum: Decomposition, expected: Decomposition
) -> dict[str, float]:
    """Returns the errors of an approximation, and its own ranks and norms.

    ``sigma_difference`` is the mean absolute difference of the sorted singular values, published
    as "nuclear error"; it is blind to singular vectors. ``spectral_error`` and
    ``relative_frobenius`` are norms of the difference over the target's. ``subspace_error`` is 1
    less the mean squared cosine between the leading singular subspaces, the mean of left and right;
    where the target's spectrum is flat, its leading subspace is arbitrary and this is near 1.

    Args:
        approximation: ``(m, n)``.
        target: ``(m, n)``, not zero.
        spectrum: decomposition of the approximation.
        expected: decomposition of the target.
    """
    difference = approximation - target
    norm = frobenius(difference)
    tall = difference.shape[0] > difference.shape[1]
    gram = difference.T @ difference if tall else difference @ difference.T
    spectral = float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())
    overlap = sum(
        float(subspace_overlap(a, b)) * a.shape[1] / b.shape[1] if a.shape[1] else 0.0
        for a, b in ((spectrum.left, expected.left), (spectrum.right, expected.right))
    )
    return {
        "sigma_difference": float((spectrum.sigma - expected.sigma).abs().mean()),
        "frobenius": norm,
        "relative_frobenius": norm / frobenius(target),
        "spectral_error": spectral / float(expected.sigma[0]),
        "subspace_error": max(0.0, 1 - overlap / 2),
        **spectrum_numbers(spectrum),
    }


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

    The options are those of ``vlkr approximate``, whose help describes them.

    Raises:
        VlkrError: for an impossible target, method, size or weight.
    """
    _check(out_features, in_features, num_terms, seeds, iterations, lr)
    if output is not None:
        check_free(output, force=force)
    place = pick_device(device)
    authors = protocol == "authors"
    if authors and methods is not None:
        raise VlkrError("the authors' protocol has its own methods; leave --methods out")
    if targets is None:
        targets = [] if weights else list(AUTHORS_MATRICES if authors else DEFAULT_MATRICES)
    shape, numbers = (out_features, in_features), range(1, seeds + 1)
    matrices = {name: [make_matrix(name, *shape, seed) for seed in numbers] for name in targets}
    if weights is not None:
        for name, weight in load_weights(weights, pretrained, tensor).items():
            cut = weight[:out_features, :in_features]
            matrices[name] = [cut if authors else unit_scale(name, weight)] * seeds
    if authors:
        matrices = {name: [authors_rounded(m) for m in made] for name, made in matrices.items()}
    benchmark = _Benchmark(
        {name: [m.to(place) for m in made] for name, made in matrices.items()},
        methods or list(AUTHORS_METHODS if authors else DEFAULT_METHODS),
        authors_method if authors else partial(sized_method, num_terms=num_terms),
        Recipe(iterations, lr, weight_decay),
        numbers,
    )
    started = time.perf_counter()
    workers = torch.get_num_threads() if place.type == "cpu" else 1
    rows = benchmark.run(workers, batched=place.type != "cpu")
    context = {
        "protocol": protocol,
        "seeds": seeds,
        "iterations": iterations,
        "lr": lr,
        "weight_decay": weight_decay,
        "budgets": {name: budget(*size, num_terms) for name, size in benchmark.sizes.items()},
        "weights": weights,
        "device": place.type,
        "threads": workers,
        "seconds_per_seed": round((time.perf_counter() - started) / seeds, 1),
    }
    known = {name: benchmark.decomposed[name] for name in matrices}
    result = Approximation(
        targets={name: [spectrum_numbers(d) for d in ds] for name, ds in known.items()},
        spectra={name: ds[0].sigma.tolist() for name, ds in known.items()},
        rows=rows,
        context=context,
        output=output,
    )
    if output is not None:
        result.write(output)
    return result


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


class _Benchmark:
    """All methods on all targets, their jobs in threads.

    Args:
        matrices: the targets by name, one matrix per seed.
        names: of the methods.
        sized: makes a method from its name, ``in_features`` and ``out_features``.
        recipe: how to train; without iterations there is only the closed form.
        seeds: one per matrix of a target.
    """

    def __init__(
        self,
        matrices: dict[str, list[Tensor]],
        names: Sequence[str],
        sized: Callable[[str, int, int], Method],
        recipe: Recipe,
        seeds: Sequence[int],
    ) -> None:
        self.matrices, self.names, self.recipe, self.seeds = matrices, names, recipe, seeds
        self.sizes = {name: (ms[0].shape[1], ms[0].shape[0]) for name, ms in matrices.items()}
        self.decomposed: dict[str, list[Decomposition]] = {}
        sizes = dict.fromkeys(self.sizes.values())
        self.methods = {(name, size): sized(name, *size) for size in sizes for name in names}
        # An adapter's factors are drawn once for all targets of a shape; training does not
        # change them. Base weights are drawn when needed, by a generator of their own.
        self.adapters: dict[Any, list[Adapter]] = {
            key: [method.make(seed) for seed in self.seeds] for key, method in self.methods.items()
        }

    def run(self, workers: int, *, batched: bool) -> list[Row]:
        """Returns a row per target and method.

        Args:
            workers: threads.
            batched: train the seeds of large matrices as one batch too.
        """
        _in_threads(self._decompose, [(name,) for name in self.matrices], workers, "targets")
        jobs = []
        for target, size in self.sizes.items():
            small = batched or math.prod(size) <= BATCHED_NUMEL
            step = len(self.seeds) if small else 1
            starts = range(0, len(self.seeds), step)
            jobs += [(target, n, slice(i, i + step)) for n in self.names for i in starts]
        rows: dict[tuple[str, str], Row] = {}
        for part in _in_threads(self._fit, jobs, workers, "approximating"):
            row = rows.setdefault((part.target, part.method), part)
            if row is not part:
                row.trained.extend(part.trained)
                row.optima.extend(part.optima)
        return list(rows.values())

    def _decompose(self, target: str) -> None:
        self.decomposed[target] = [decompose(m, LEADING) for m in self.matrices[target]]

    def _fit(self, target: str, name: str, chosen: slice) -> Row:
        """Runs one method on one target, for seeds that are trained side by side."""
        key = name, self.sizes[target]
        method, adapters = self.methods[key], self.adapters[key][chosen]
        matrices, expected = self.matrices[target][chosen], self.decomposed[target][chosen]
        optima = []
        for adapter, matrix in zip(adapters, matrices, strict=True):
            best = optimum(adapter, matrix)
            if best is not None:
                optima.append(frobenius(best - matrix) / frobenius(matrix))
        trained: list[dict[str, float]] = []
        spectrum: list[float] | None = None
        if self.recipe.iterations > 0:
            stacked, weights = torch.stack(matrices), None
            if method.base_weight is not None:
                weights = torch.stack([method.base_weight(s) for s in self.seeds[chosen]])
                weights = weights.to(stacked)
            updates = fit(adapters, stacked, self.recipe, weights)
            if not torch.isfinite(updates).all():
                raise VlkrError(f"{method.name} diverged on {target}; a smaller --lr may help")
            for update, matrix, known in zip(updates, matrices, expected, strict=True):
                own = decompose(update, LEADING)
                trained.append(approximation_measures(update, matrix, own, known))
                spectrum = spectrum or own.sigma.tolist()
        return Row(
            target, method.name, method.parameters, method.options, trained, optima, spectrum
        )


def _in_threads(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, title: str
) -> list[Any]:
    """Runs jobs side by side, one thread each: faster than threads within operations."""
    with (
        progress_bar() as progress,
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        task = progress.add_task(title, total=len(jobs))

        def advance(_: Future[Any]) -> None:
            progress.advance(task)

        futures = [pool.submit(function, *arguments) for arguments in jobs]
        try:
            for future in futures:
                future.add_done_callback(advance)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
