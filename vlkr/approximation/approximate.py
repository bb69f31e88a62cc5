"""The command ``vlkr approximate``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlkr.errors import VlkrError
from vlkr.files import check_free

if TYPE_CHECKING:
    from vlkr.approximation.report import Approximation, Row
    from vlkr.functional import Decomposition


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
    import torch

    from vlkr.approximation.authors import (
        AUTHORS_METHODS,
        AUTHORS_TARGETS,
        authors_method,
        authors_target,
    )
    from vlkr.approximation.benchmark import (
        BATCHED_NUMEL,
        approximate_one,
        in_threads,
        synthetic,
        unit_scale,
    )
    from vlkr.approximation.fit import Recipe
    from vlkr.approximation.measures import LEADING, target_measures
    from vlkr.approximation.methods import DEFAULT_METHODS, budget, sized_method
    from vlkr.approximation.report import Approximation, joined, write_report
    from vlkr.approximation.targets import DEFAULT_TARGETS, weight_targets
    from vlkr.functional import decompose
    from vlkr.runtime import pick_device

    _check(out_features, in_features, num_terms, seeds, iterations, lr)
    if output is not None:
        check_free(output, force=force)
    place = pick_device(device)
    authors = protocol == "authors"
    if authors and methods is not None:
        raise VlkrError("the authors' protocol has its own methods; leave --methods out")
    if targets is None:
        targets = [] if weights else list(AUTHORS_TARGETS if authors else DEFAULT_TARGETS)
    known = {n: synthetic(n, out_features, in_features, seeds) for n in targets}
    if weights is not None:
        for name, weight in weight_targets(weights, pretrained, tensor).items():
            scaled = weight[:out_features, :in_features] if authors else unit_scale(name, weight)
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
        name: seeds if place.type != "cpu" or math.prod(shape) <= BATCHED_NUMEL else 1
        for name, shape in shapes.items()
    }
    workers = torch.get_num_threads() if place.type == "cpu" else 1
    jobs = [
        (target, name, first)
        for target in known
        for name in names
        for first in range(0, seeds, together[target])
    ]
    in_threads([(decompose_target, (name,)) for name in known], workers, "targets")
    in_threads([(run, job) for job in jobs], workers, "approximating")
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
