"""The adapter methods by name, and the check of their options."""

from __future__ import annotations

import difflib
import math
from typing import Any

from vlkr.adapters.base import Adapter, option_defaults
from vlkr.adapters.dora import DoRA
from vlkr.adapters.full import BitFit, Full
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.krona import KronA
from vlkr.adapters.lora import LoRA
from vlkr.adapters.randlora import RandLoRA
from vlkr.adapters.sinlora import SinLoRA
from vlkr.adapters.vera import VeRA
from vlkr.errors import VlkrError

ADAPTERS: dict[str, type[Adapter]] = {
    "kradapter": KRAdapter,
    "lora": LoRA,
    "dora": DoRA,
    "vera": VeRA,
    "randlora": RandLoRA,
    "sinlora": SinLoRA,
    "krona": KronA,
    "full": Full,
    "bitfit": BitFit,
}


def adapter_class(method: str) -> type[Adapter]:
    """Returns the class of a method; an unknown one raises :class:`VlkrError`."""
    if method not in ADAPTERS:
        near = difflib.get_close_matches(method, ADAPTERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(ADAPTERS))}"
        raise VlkrError(f"unknown adapter {method!r}; {hint}")
    return ADAPTERS[method]


def registered_name(adapter: Adapter) -> str:
    """Returns the name of the adapter's method."""
    return next(name for name, cls in ADAPTERS.items() if cls is type(adapter))


def check_options(method: str, options: dict[str, Any]) -> None:
    """Raises :class:`VlkrError` for an option that the method lacks, or of a different type."""
    known = option_defaults(adapter_class(method))
    for name, value in options.items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise VlkrError(f"adapter {method!r} has no option {name!r}; known: {listed}")
        if not _is_like(value, known[name]):
            raise VlkrError(
                f"option {name} of adapter {method!r} is {value!r}, expected a value like "
                f"{1.0 if known[name] is None else known[name]!r}"
            )


def _is_like(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or _is_like(value, 1.0)
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return type(value) is type(default)
