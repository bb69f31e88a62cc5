"""``vlkr approximate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vlkr.cli.options import Switch


def approximate(
    *,
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
    force: Switch = False,
) -> Any:
    """Approximates matrices of known spectra by adapters, trained and in closed form.

    Args:
        targets: ``gaussian``, ``sparse``, ``whitened``, ``low-rank``, ``high-frequency``,
            ``low-frequency`` (these six by default), ``high-frequency-aliased``,
            ``power-law:EXPONENT``.
        methods: ``lora``, ``sinlora``, ``kradapter``, ``kradapter:balanced``, ``randlora``,
            ``krona``, ``vera``, ``full`` (these by default), any with options such as
            ``kradapter:num_terms=2`` or ``lora:rank=8``.
        weights: safetensors file or model whose weights are targets too; alone, the only ones.
        pretrained: open_clip tag of that model.
        tensor: name of the weight; by default the last text and visual ``in_proj_weight``.
        protocol: ``authors`` takes the published script's targets, methods, sizes and unequal
            budgets; weights are then cut to 1024x768 and not scaled.
        out_features: rows of the synthetic targets.
        in_features: columns of the synthetic targets.
        num_terms: the budget is a balanced KRAdapter's with this many products; the other methods
            take the size that is nearest to it.
        seeds: number of random seeds for targets and initial factors.
        iterations: training iterations; 0 takes closed forms alone.
        lr: AdamW learning rate; the default is the published one.
        weight_decay: AdamW weight decay.
        device: ``auto``, ``cpu``, ``cuda``, ...
        output: folder for ``report.md``, ``results.json``, ``errors.png`` and ``spectra.png``.
        force: allow a non-empty output folder.
    """
    options = locals()
    from vlkr.analysis.benchmark import approximate

    return approximate(**options)
