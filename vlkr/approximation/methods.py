"""The methods of the benchmark: adapters at an equal budget, and their optima in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.budget import match_budget
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.krona import KronA
from vlkr.adapters.lora import LoRA
from vlkr.adapters.projection import project
from vlkr.adapters.registry import adapter_class, check_options, registered_name
from vlkr.errors import VlkrError
from vlkr.functional import project_kronecker

DEFAULT_METHODS = (
    "lora",
    "sinlora",
    "kradapter",
    "kradapter:balanced",
    "randlora",
    "krona",
    "vera",
    "full",
)
#: a method that comes no nearer to the budget than this keeps its own, smaller size.
TOLERANCE = 0.5
#: matrices of unit mean square ask for a plain product, where layers have their own scale.
_SHORT: dict[str, dict[str, Any]] = {"balanced": {"rule": "balanced"}}
_OPTIONS: dict[str, dict[str, Any]] = {
    "kradapter": {"scale": 1.0},
    "sinlora": {"frequency": 20.0, "gain": 1.0},
}


@dataclass(frozen=True)
class Method:
    """An adapter and its options for a matrix of one shape.

    Attributes:
        name: as it is given, ``lora`` or ``kradapter:balanced``.
        parameters: trainable ones.
        make: an adapter for this seed.
        options: of the adapter, for the reader.
    """

    name: str
    parameters: int
    make: Callable[[int], Adapter]
    options: dict[str, Any] = field(default_factory=dict)


def budget(in_features: int, out_features: int, num_terms: int = 1) -> int:
    """The benchmark's parameter count: the balanced KRAdapter's with this many products."""
    return KRAdapter.num_parameters(in_features, out_features, rule="balanced", num_terms=num_terms)


def sized_method(name: str, in_features: int, out_features: int, num_terms: int = 1) -> Method:
    """A method with the size that is nearest to the budget.

    Args:
        name: ``lora``, or with options ``kradapter:balanced,num_terms=2``. A size among the
            options is kept.
        in_features: columns of the matrix.
        out_features: rows.
        num_terms: as for :func:`budget`.

    Raises:
        VlkrError: for an unknown method or option, or one that changes no weight.
    """
    kind, options = _parse(name)
    cls = adapter_class(kind)
    if cls.adapts_bias or kind == "dora":
        raise VlkrError(f"method {kind!r} has no change of a weight by itself to approximate with")
    options = _OPTIONS.get(kind, {}) | options
    if cls.budget_option and cls.budget_option not in options:
        with torch.device("meta"):
            matrix = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
        to = {"rule": "balanced", "num_terms": num_terms}
        found = match_budget(kind, matrix, targets=["0"], to_options=to, **options)
        own = cls.num_parameters(in_features, out_features, **options)
        if abs(found.difference) <= TOLERANCE or own > found.reference_parameters:
            options = found.options
    if kind == "randlora" and "alpha" not in options:
        options["alpha"] = float(options.get("rank", 32))
    parameters = cls.num_parameters(in_features, out_features, **options)

    def make(seed: int) -> Adapter:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            basis = {"seed": 2 * seed} if kind in ("randlora", "vera") else {}
            return cls(in_features, out_features, **(basis | options))

    return Method(name, parameters, make, options)


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    kind, _, text = name.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        if item in _SHORT:
            options |= _SHORT[item]
            continue
        key, equals, value = item.partition("=")
        if not equals:
            raise VlkrError(f"{item!r} in method {name!r} is no option, expected name=value")
        options[key.strip()] = yaml.safe_load(value)
    check_options(kind, options)
    return kind, options


def optimum(adapter: Adapter, target: Tensor) -> Tensor | None:
    """The change nearest to ``target`` that a method can make, from its closed form.

    Args:
        adapter: gives the method and its size; its factors do not matter.
        target: ``(out_features, in_features)``.

    Returns:
        The change, or None for a method without a closed form. For a KRAdapter whose factors
        do not fill the long side exactly, its error is an upper bound on the optimum's.
    """
    if type(adapter) is LoRA or (type(adapter) is KRAdapter and adapter.num_factors == 2):
        return project(target, registered_name(adapter), **adapter.options()).delta().detach()
    if type(adapter) is KronA:
        left, right = project_kronecker(
            target, adapter.krona_A.shape[1:], num_terms=adapter.num_terms
        )
        blocks = torch.einsum("tac,tbd->abcd", left, right)
        return blocks.flatten(2, 3).flatten(0, 1)
    return None


def kaiming(factor: Tensor) -> None:
    """Fills a matrix as :class:`torch.nn.Linear` starts its weight."""
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
