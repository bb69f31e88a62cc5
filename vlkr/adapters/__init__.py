"""Adapter methods, the modules that host them, and what is done with them."""

from vlkr.adapters.base import Adapter
from vlkr.adapters.budget import (
    Budget,
    Projected,
    count_parameters,
    match_budget,
    project,
    project_model,
)
from vlkr.adapters.dora import DoRA
from vlkr.adapters.full import BitFit, Full
from vlkr.adapters.inject import (
    ComposedWeightCache,
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    merge_adapters,
    merge_and_unload,
    merged,
    remove_adapters,
    set_adapter,
    set_adapter_scale,
)
from vlkr.adapters.io import load_adapter, load_authors_kradapter, save_adapter
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.krona import KronA
from vlkr.adapters.lora import LoRA
from vlkr.adapters.randlora import RandLoRA
from vlkr.adapters.registry import ADAPTERS
from vlkr.adapters.sinlora import SinLoRA
from vlkr.adapters.targets import Target, find_targets
from vlkr.adapters.vera import VeRA

__all__ = [
    "ADAPTERS",
    "Adapter",
    "BitFit",
    "Budget",
    "ComposedWeightCache",
    "DoRA",
    "Full",
    "KRAdapter",
    "KronA",
    "LoRA",
    "Projected",
    "RandLoRA",
    "SinLoRA",
    "Target",
    "VeRA",
    "adapter_parameters",
    "adapter_state_dict",
    "add_adapters",
    "count_parameters",
    "find_targets",
    "load_adapter",
    "load_authors_kradapter",
    "match_budget",
    "merge_adapters",
    "merge_and_unload",
    "merged",
    "project",
    "project_model",
    "remove_adapters",
    "save_adapter",
    "set_adapter",
    "set_adapter_scale",
]
