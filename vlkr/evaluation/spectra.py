"""The spectra of adapted layers: what a run changed, beside the weights that it changed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vlkr.adapters.compose import base_parameter
from vlkr.adapters.inject import injected_adapters
from vlkr.adapters.targets import Target, candidates
from vlkr.evaluation.evaluate import evaluate
from vlkr.evaluation.spectrum_report import Layer, Run
from vlkr.functional import Decomposition, decompose, spectrum_measures, subspace_overlap

#: dimensions of the leading subspaces that are compared, at most a quarter of a weight's.
LEADING = 16


@torch.no_grad()
def model_spectra(model: nn.Module) -> list[Layer]:
    """The spectra of a model's adapters, in its order."""
    modules = dict(model.named_modules())
    known = {(target.module, target.slot): target for target in candidates(model)}
    layers = []
    for placed in injected_adapters(model):
        if placed.adapter.adapts_bias:
            continue
        weight = placed.slot.select(base_parameter(modules[placed.module], placed.slot.parameter))
        # A parameter that no linear layer owns goes by its own name.
        plain = Target(placed.module, placed.slot, placed.name, weight.shape[1], weight.shape[0])
        target = known.get((placed.module, placed.slot), plain)
        delta = placed.scale * placed.adapter.delta(weight)
        measures, sigma, base_sigma = layer_measures(delta.float(), weight.float())
        layers.append(
            Layer(
                target.path,
                target.tower or "model",
                target.block,
                target.name,
                (weight.shape[0], weight.shape[1]),
                measures,
                sigma.tolist(),
                base_sigma.tolist(),
            )
        )
    return layers


def layer_measures(delta: Tensor, weight: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """What a change does to a weight.

    ``ratio`` is the change's Frobenius norm over the weight's. ``overlap`` is the mean squared
    cosine between their leading singular subspaces, the mean of left and right, and
    ``chance_overlap`` what random ones of that size have in the mean.

    Args:
        delta: ``(out_features, in_features)``.
        weight: the base weight, of the same shape.

    Returns:
        The measures, and both spectra in descending order.
    """
    leading = max(1, min(LEADING, min(weight.shape) // 4))
    change, base = decompose(delta, leading), decompose(weight, leading)
    measures = {k: float(v) for k, v in spectrum_measures(change.sigma).items()}
    base_measures = {k: float(v) for k, v in spectrum_measures(base.sigma).items()}
    norm = base_measures["frobenius_norm"]
    measures["ratio"] = measures["frobenius_norm"] / norm if norm > 0 else 0.0
    measures["overlap"] = _overlap(change, base)
    measures["chance_overlap"] = statistics.mean(leading / n for n in weight.shape)
    return (
        measures | {f"base_{name}": value for name, value in base_measures.items()},
        change.sigma,
        base.sigma,
    )


def _overlap(change: Decomposition, base: Decomposition) -> float:
    if change.left.shape[1] == 0 or base.left.shape[1] == 0:
        return 0.0
    return statistics.mean(
        float(subspace_overlap(a, b))
        for a, b in ((change.left, base.left), (change.right, base.right))
    )


def shift_loss(folder: Path, device: str = "auto") -> float | None:
    """Top-1 accuracy that a run loses from home to the mean of its shifts, None without shifts."""
    evaluation = evaluate(run=folder, device=device)
    if not evaluation.shifts:
        return None
    return evaluation.in_distribution.metrics["acc1"] - evaluation.mean_shift()


def correlations(runs: Sequence[Run]) -> dict[str, float]:
    """Spearman's rank correlation of each measure's mean over layers with the loss under shift.

    Empty unless three runs have that loss. A measure that is the same in all runs has none.
    """
    measured = [(r, r.shift_loss) for r in runs if r.shift_loss is not None]
    if len(measured) < 3:
        return {}
    losses = [loss for _, loss in measured]
    found = {
        name: spearman([r.mean(name) for r, _ in measured], losses)
        for name in runs[0].layers[0].measures
        if not name.startswith("base_") and name != "chance_overlap"
    }
    return {name: value for name, value in found.items() if value is not None}


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None if one side is constant.

    >>> spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
    0.5
    """
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return round(statistics.correlation(_ranks(a), _ranks(b)), 12)


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(o == value for o in values) + 1) / 2
        for value in values
    ]
