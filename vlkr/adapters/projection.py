"""The best adapter of a weight change: from a full fine-tune to an adapter with a known error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.compose import base_parameter
from vlkr.adapters.inject import inject_adapters
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.lora import LoRA
from vlkr.adapters.registry import adapter_class, check_options
from vlkr.adapters.targets import DEFAULT_TARGETS, Target, find_targets
from vlkr.errors import VlkrError
from vlkr.functional import project_kradapter, project_lora


@torch.no_grad()
def project(delta: Tensor, method: str, **options: Any) -> Adapter:
    """The adapter whose change is nearest to ``delta`` in the Frobenius norm.

    KRAdapter's is the truncated SVD of each row of the short side (see
    :func:`vlkr.functional.project_kradapter`), LoRA's that of the matrix (Eckart and Young, 1936).

    Args:
        delta: a weight change ``(out_features, in_features)``.
        method: ``"kradapter"`` with two factors, or ``"lora"``.
        **options: of the method, such as ``num_terms`` or ``rank``.

    Returns:
        The adapter; its ``delta()`` is the projection, in fp32.

    Raises:
        VlkrError: for another method, or ``delta`` that is no finite matrix.

    >>> adapter = project(torch.diag(torch.tensor([2.0, 1.0])), "lora", rank=1)
    >>> [[round(abs(x), 4) for x in row] for row in adapter.delta().tolist()]
    [[2.0, 0.0], [0.0, 0.0]]
    """
    if delta.dim() != 2 or not torch.isfinite(delta).all():
        raise VlkrError(f"a {tuple(delta.shape)} change cannot be projected: no finite matrix")
    check_options(method, options)
    adapter = adapter_class(method)(delta.shape[1], delta.shape[0], **options)
    factor = getattr(adapter, "scaling", getattr(adapter, "scale", 1.0))
    if factor == 0:
        raise VlkrError(f"{method!r} with {options} is always zero, nothing to project onto")
    if isinstance(adapter, KRAdapter) and adapter.num_factors == 2:
        # In the balanced rule the zero factor is the slow one in a row.
        swap = adapter.rule == "balanced"
        inner = adapter.v if swap else adapter.u
        fast, slow = project_kradapter(
            delta / adapter.scale, inner.shape[-1], num_terms=adapter.num_terms
        )
        adapter.u.copy_(slow if swap else fast)
        adapter.v.copy_(fast if swap else slow)
    elif type(adapter) is LoRA:
        lora_a, lora_b = project_lora(delta / adapter.scaling, adapter.rank)
        adapter.lora_A.copy_(lora_a)
        adapter.lora_B.copy_(lora_b)
    else:
        raise VlkrError(f"no closed form for {method!r} with {options}: use kradapter or lora")
    return adapter


@dataclass(frozen=True)
class Projected:
    """One weight's projection.

    Attributes:
        target: the weight.
        delta_norm: Frobenius norm of the change, relative to the base weight's.
        error: Frobenius norm of what the adapter misses, relative to the change's.
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
    """Puts the nearest adapters of a fine-tuned model onto its base.

    Args:
        model: the base, changed in place as by :func:`vlkr.add_adapters`.
        tuned: the fine-tuned state dict, with the base's keys.
        method: ``"kradapter"`` or ``"lora"``.
        targets: as for :func:`vlkr.add_adapters`.
        towers: likewise.
        blocks: likewise.
        **options: of the method.

    Returns:
        The relative error of each weight. Changes of other weights are not represented.

    Raises:
        VlkrError: if ``tuned`` lacks a weight, or has it in another shape.
    """
    made: list[tuple[Target, Adapter]] = []
    report: list[Projected] = []
    modules = dict(model.named_modules())
    for target in find_targets(model, targets, towers, blocks):
        key = f"{target.module}.{target.slot.parameter}".lstrip(".")
        base = base_parameter(modules[target.module], target.slot.parameter)
        if key not in tuned or tuned[key].shape != base.shape:
            found = tuple(tuned[key].shape) if key in tuned else "nothing"
            raise VlkrError(f"the tuned model has {found} at {key}, expected {tuple(base.shape)}")
        weight = target.slot.select(base).float()
        delta = target.slot.select(tuned[key].to(base.device)).float() - weight
        adapter = project(delta, method, **options)
        missed = torch.linalg.matrix_norm(delta - adapter.delta().to(delta.device))
        norm = torch.linalg.matrix_norm(delta)
        report.append(
            Projected(
                target,
                (norm / torch.linalg.matrix_norm(weight)).item(),
                (missed / norm).item() if norm > 0 else 0.0,
            )
        )
        made.append((target, adapter))
    inject_adapters(model, made)
    return report
