"""Equal budgets: the size of one method that is nearest to another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlkr.adapters.registry import adapter_class, check_options
from vlkr.adapters.targets import DEFAULT_TARGETS, find_targets
from vlkr.errors import VlkrError


@dataclass(frozen=True)
class Budget:
    """Options of a method at another's parameter count.

    Attributes:
        options: what to give :func:`vlkr.add_adapters`, e.g. ``{"rank": 28}``.
        parameters: trainable parameters with these options.
        reference_parameters: those of the method that was to be met.
    """

    options: dict[str, Any]
    parameters: int
    reference_parameters: int

    @property
    def difference(self) -> float:
        """Relative difference to the reference, positive when larger."""
        return self.parameters / self.reference_parameters - 1


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
        method: the method to size, such as ``"lora"``.
        model: without adapters, or with; only its shapes are read.
        to: the method to meet.
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
    shapes = [(t.in_features, t.out_features) for t in find_targets(model, targets, towers, blocks)]
    goal = sum(reference.num_parameters(*shape, **(to_options or {})) for shape in shapes)

    def count(size: int) -> int:
        sized = {**options, size_option: size}
        return sum(cls.num_parameters(*shape, **sized) for shape in shapes)

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
