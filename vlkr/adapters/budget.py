"""Sizes adapters: parameter counts, equal budgets, and the nearest adapters of a fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.compose import base_parameter
from vlkr.adapters.inject import inject_adapters
from vlkr.adapters.registry import adapter_class, check_options
from vlkr.adapters.targets import DEFAULT_TARGETS, Target, bias_targets, find_targets
from vlkr.errors import VlkrError


@dataclass(frozen=True)
class Budget:
    """Options of a method at the parameter count of a reference method.

    Attributes:
        options: keyword arguments for :func:`vlkr.add_adapters`, e.g. ``{"rank": 28}``.
        parameters: number of trainable parameters with these options.
        reference_parameters: number of trainable parameters of the reference.
    """

    options: dict[str, Any]
    parameters: int
    reference_parameters: int

    @property
    def difference(self) -> float:
        """Relative difference to the reference, positive when larger."""
        return self.parameters / self.reference_parameters - 1


def count_parameters(
    method: str,
    model: nn.Module,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    towers: Sequence[str] = ("visual", "text"),
    blocks: Sequence[int] | None = None,
    **options: Any,
) -> int:
    """Returns the number of parameters that :func:`vlkr.add_adapters` would train.

    Args:
        method: ``"kradapter"``, ``"lora"``, ...
        model: on any device, also the meta device; only its shapes are read.
        targets: as for :func:`vlkr.add_adapters`.
        towers: likewise.
        blocks: likewise.
        **options: options of the method.

    Raises:
        VlkrError: as :func:`vlkr.add_adapters`.
    """
    check_options(method, options)
    cls = adapter_class(method)
    matched = find_targets(model, targets, towers, blocks)
    if cls.adapts_bias:
        matched = bias_targets(model, matched)
    return _count(cls, _shapes(matched), options)


def match_budget(
    method: str,
    model: nn.Module,
    to: str = "kradapter",
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    towers: Sequence[str] = ("visual", "text"),
    blocks: Sequence[int] | None = None,
    to_options: dict[str, Any] | None = None,
    **options: Any,
) -> Budget:
    """Finds the size of ``method`` whose parameter count is nearest to that of ``to``.

    Args:
        method: method to size, such as ``"lora"``.
        model: without adapters, or with; only its shapes are read.
        to: method to match.
        targets: as for :func:`vlkr.add_adapters`, the same for both methods.
        towers: likewise.
        blocks: likewise.
        to_options: options of ``to``.
        **options: further options of ``method``.

    Returns:
        The options, and both parameter counts.

    Raises:
        VlkrError: if ``method`` has no size to choose, or its size is among the options.
    """
    cls, reference = adapter_class(method), adapter_class(to)
    check_options(method, options)
    check_options(to, to_options or {})
    size_option = cls.budget_option
    if size_option is None:
        raise VlkrError(f"adapter {method!r} has no size to match to {to!r}")
    if size_option in options:
        raise VlkrError(
            f"adapter {method!r} has its own {size_option} {options[size_option]}, and the budget "
            f"of {to!r} chooses it; leave one of them out"
        )
    shapes = _shapes(find_targets(model, targets, towers, blocks))
    goal = _count(reference, shapes, to_options or {})

    def count(size: int) -> int:
        return _count(cls, shapes, {**options, size_option: size})

    # Parameters grow with a rank, or shrink with it where a basis has that rank.
    grows = count(2) > count(1)
    largest = min(min(shape) for shape in shapes)
    low, high = 1, 2
    while (count(high) < goal) == grows and high < largest:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (count(middle) < goal) == grows else (low, middle)
    size = min((low, high), key=lambda s: abs(count(s) - goal))
    return Budget({**options, size_option: size}, count(size), goal)


def _shapes(targets: Sequence[Target]) -> list[tuple[int, int]]:
    return [(target.in_features, target.out_features) for target in targets]


def _count(cls: type[Adapter], shapes: Sequence[tuple[int, int]], options: dict[str, Any]) -> int:
    return sum(cls.num_parameters(*shape, **options) for shape in shapes)


def project(delta: Tensor, method: str, **options: Any) -> Adapter:
    """Returns the adapter whose update is nearest to ``delta`` in the Frobenius norm.

    For KRAdapter that is the truncated SVD of each row of the short side (see
    :func:`vlkr.projections.project_kradapter`), for LoRA that of the matrix (Eckart and Young,
    1936), for KronA that of the matrix of blocks (Van Loan and Pitsianis, 1993).

    Args:
        delta: a weight update ``(out_features, in_features)``.
        method: ``"kradapter"`` with two factors, ``"lora"`` or ``"krona"``.
        **options: options of the method, such as ``num_terms`` or ``rank``.

    Returns:
        The adapter; its ``delta()`` is the projection, in fp32.

    Raises:
        VlkrError: for another method, or if ``delta`` is not a finite matrix.

    >>> adapter = project(torch.diag(torch.tensor([2.0, 1.0])), "lora", rank=1)
    >>> [[round(abs(x), 4) for x in row] for row in adapter.delta().tolist()]
    [[2.0, 0.0], [0.0, 0.0]]
    """
    if delta.dim() != 2 or not torch.isfinite(delta).all():
        raise VlkrError(f"cannot project {tuple(delta.shape)}: it is not a finite matrix")
    check_options(method, options)
    adapter = adapter_class(method)(delta.shape[1], delta.shape[0], **options)
    if not adapter.has_closed_form:
        raise VlkrError(
            f"no closed form for {method!r} with {options}: use lora, krona, or kradapter with two "
            "factors"
        )
    adapter.fit_to(delta)
    return adapter


@dataclass(frozen=True)
class Projected:
    """Projection of the update of one weight.

    Attributes:
        target: the weight.
        delta_norm: Frobenius norm of the update, relative to the base weight's.
        error: Frobenius norm of what the adapter misses, relative to the update's.
    """

    target: Target
    delta_norm: float
    error: float


@torch.no_grad()
def project_model(
    model: nn.Module,
    tuned: Mapping[str, Tensor],
    method: str,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    towers: Sequence[str] = ("visual", "text"),
    blocks: Sequence[int] | None = None,
    **options: Any,
) -> list[Projected]:
    """Adds to a base model the nearest adapters of a fine-tuned one.

    Args:
        model: the base, changed in place as by :func:`vlkr.add_adapters`.
        tuned: the fine-tuned state dict, with the base's keys.
        method: as for :func:`project`.
        targets: as for :func:`vlkr.add_adapters`.
        towers: likewise.
        blocks: likewise.
        **options: options of the method.

    Returns:
        The relative error of each weight. Updates of other weights are not represented.

    Raises:
        VlkrError: if ``tuned`` lacks a weight, or has it in a different shape.
    """
    adapters: list[tuple[Target, Adapter]] = []
    report: list[Projected] = []
    modules = dict(model.named_modules())
    for target in find_targets(model, targets, towers, blocks):
        key = f"{target.module}.{target.slot.parameter}".lstrip(".")
        base = base_parameter(modules[target.module], target.slot.parameter)
        if key not in tuned or tuned[key].shape != base.shape:
            shape = tuple(tuned[key].shape) if key in tuned else "nothing"
            raise VlkrError(f"the tuned model has {shape} at {key}, expected {tuple(base.shape)}")
        weight = target.slot.select(base).float()
        delta = target.slot.select(tuned[key].to(base.device)).float() - weight
        adapter = project(delta, method, **options)
        missed = torch.linalg.matrix_norm(delta - adapter.delta().to(delta.device))
        norm = torch.linalg.matrix_norm(delta)
        relative_norm = (norm / torch.linalg.matrix_norm(weight)).item()
        report.append(Projected(target, relative_norm, (missed / norm).item() if norm > 0 else 0.0))
        adapters.append((target, adapter))
    inject_adapters(model, adapters)
    return report
