"""Few-shot adaptation of CLIP with Khatri-Rao adapters, evaluated under domain shift.

The names below are imported at their first use, so that ``import vlkr`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlkr.errors import VlkrError
from vlkr.version import __version__

if TYPE_CHECKING:
    from vlkr import adapters, functional
    from vlkr.adapters import (
        adapter_parameters,
        adapter_state_dict,
        add_adapters,
        load_adapter,
        match_budget,
        merge_adapters,
        merge_and_unload,
        project,
        remove_adapters,
        save_adapter,
        set_adapter_scale,
    )

_FROM_ADAPTERS = (
    "adapter_parameters",
    "adapter_state_dict",
    "add_adapters",
    "load_adapter",
    "match_budget",
    "merge_adapters",
    "merge_and_unload",
    "project",
    "remove_adapters",
    "save_adapter",
    "set_adapter_scale",
)
_MODULES = ("adapters", "functional")

__all__ = [
    "VlkrError",
    "__version__",
    "adapter_parameters",
    "adapter_state_dict",
    "adapters",
    "add_adapters",
    "functional",
    "load_adapter",
    "match_budget",
    "merge_adapters",
    "merge_and_unload",
    "project",
    "remove_adapters",
    "save_adapter",
    "set_adapter_scale",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vlkr.{name}")
    if name in _FROM_ADAPTERS:
        return getattr(importlib.import_module("vlkr.adapters"), name)
    raise AttributeError(f"module 'vlkr' has no attribute {name!r}")
