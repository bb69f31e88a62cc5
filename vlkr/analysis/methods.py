"""The methods of the matrix benchmark: adapters at a matched budget, optima, the authors' sizes.

The published benchmark of KRAdapter (arXiv 2508.00230, section 4) has settings of its own: matrices
1024x768 in half precision, AdamW with learning rate 0.1 for 300 iterations, every low-rank factor
Kaiming-uniform (``a=sqrt(5)``), and budgets that are not equal: at this size LoRA and SinLoRA
50,176 parameters, KRAdapter 49,152, RandLoRA 86,025, Kronecker 6,561. One definition is not
repeated: a weight update with more rows than the target is cut here, where the script stopped with
an error that it swallowed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from vlkr.adapters.base import Adapter, option_defaults
from vlkr.adapters.budget import match_budget
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.lora import LoRA
from vlkr.adapters.randlora import RandLoRA
from vlkr.adapters.registry import adapter_class, check_options
from vlkr.adapters.sinlora import SinLoRA
from vlkr.errors import VlkrError

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
AUTHORS_METHODS = ("LoRA", "SinLoRA", "KRAdapter", "RandLoRA", "Kronecker")
AUTHORS_MATRICES = (
    "gaussian",
    "sparse",
    "whitened",
    "low-rank",
    "high-frequency-aliased",
    "low-frequency",
)
#: a method that comes no nearer to the budget than this keeps its own, smaller size.
TOLERANCE = 0.5
_SHORT: dict[str, dict[str, Any]] = {"balanced": {"rule": "balanced"}}
#: matrices of unit mean square call for a plain product, where layers have their own scale.
_OPTIONS: dict[str, dict[str, Any]] = {
    "kradapter": {"scale": 1.0},
    "sinlora": {"frequency": 20.0, "gain": 1.0},
}
_WEIGHT_SEED = 10**6  # base weights are drawn apart from the targets


@dataclass(frozen=True)
class Method:
    """An adapter and its options for a matrix of one shape.

    Attributes:
        name: as it is given, ``lora`` or ``kradapter:balanced``.
        parameters: number of trained ones.
        make: makes the adapter of a seed.
        options: of the adapter, for the reader.
        base_weight: makes the base weight of a seed ``(out_features, in_features)``, for a method
            whose update depends on it: standard normal, with the targets' mean square.
    """

    name: str
    parameters: int
    make: Callable[[int], Adapter]
    options: dict[str, Any] = field(default_factory=dict)
    base_weight: Callable[[int], Tensor] | None = None


def budget(in_features: int, out_features: int, num_terms: int = 1) -> int:
    """Returns the benchmark's parameter count: a balanced KRAdapter's with so many products."""
    return KRAdapter.num_parameters(in_features, out_features, rule="balanced", num_terms=num_terms)


def sized_method(name: str, in_features: int, out_features: int, num_terms: int = 1) -> Method:
    """Returns a method with the size that is nearest to the budget.

    Args:
        name: ``lora``, or with options ``kradapter:balanced,num_terms=2``. A size among the
            options is kept.
        in_features: columns of the matrix.
        out_features: rows.
        num_terms: as for :func:`budget`.

    Raises:
        VlkrError: for an unknown method or option, or one that updates no weight.
    """
    kind, options = _parse(name)
    cls = adapter_class(kind)
    if cls.adapts_bias:
        raise VlkrError(f"method {kind!r} updates no weight, so it cannot approximate one")
    options = _OPTIONS.get(kind, {}) | options
    if cls.budget_option and cls.budget_option not in options:
        with torch.device("meta"):
            matrix = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
        to = {"rule": "balanced", "num_terms": num_terms}
        match = match_budget(kind, matrix, targets=["0"], to_options=to, **options)
        own = cls.num_parameters(in_features, out_features, **options)
        if abs(match.difference) <= TOLERANCE or own > match.reference_parameters:
            options = match.options
    if kind == "randlora" and "alpha" not in options:
        options["alpha"] = float(options.get("rank", 32))
    parameters = cls.num_parameters(in_features, out_features, **options)

    def base_weight(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(_WEIGHT_SEED + seed)
        return torch.randn(out_features, in_features, generator=generator)

    def make(seed: int) -> Adapter:
        basis = {"seed": 2 * seed} if "seed" in option_defaults(cls) else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = cls(in_features, out_features, **(basis | options))
        if cls.needs_weight:
            adapter.init_from_weight(base_weight(seed))
        return adapter

    return Method(name, parameters, make, options, base_weight if cls.needs_weight else None)


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    kind, _, text = name.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        if item in _SHORT:
            options |= _SHORT[item]
            continue
        key, equals, value = item.partition("=")
        if not equals:
            raise VlkrError(f"{item!r} in method {name!r} is not an option, expected name=value")
        options[key.strip()] = yaml.safe_load(value)
    check_options(kind, options)
    return kind, options


def optimum(adapter: Adapter, target: Tensor) -> Tensor | None:
    """Returns the update nearest to ``target`` that a method can make, from its closed form.

    Args:
        adapter: gives the method and its size; its factors do not matter.
        target: ``(out_features, in_features)``.

    Returns:
        The weight update, or None for a method without a closed form. For a KRAdapter whose
        factors do not fill the long side exactly, its error is an upper bound on the optimum's.
    """
    if not adapter.has_closed_form:
        return None
    nearest = copy.deepcopy(adapter)
    nearest.fit_to(target)
    return nearest.delta().detach()


class AuthorsRandLoRA(RandLoRA):
    """RandLoRA with one basis more than needed, bases scaled to unit deviation, and ``gamma = 0``.

    Args:
        in_features: columns.
        out_features: rows.
        rank: of one basis.
        seed: of the bases.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, seed: int = 0) -> None:
        super().__init__(in_features, out_features, rank=rank, alpha=float(rank), seed=seed)
        short, long = sorted((in_features, out_features))
        bases = math.ceil(short / rank) + 1
        generator = torch.Generator().manual_seed(seed)
        self.B = _unit_deviation(torch.rand(long, bases, rank, generator=generator))
        self.A = _unit_deviation(torch.rand(rank, short, generator=generator))
        self.randlora_lambda = nn.Parameter(torch.full((bases, rank), 1 / bases))
        self.randlora_gamma = nn.Parameter(torch.zeros(bases, short))


def _unit_deviation(uniform: Tensor) -> Tensor:
    centered = 2 * uniform - 1
    return centered / centered.std()


class AuthorsKronecker(Adapter):
    """One Kronecker product, cut to the target's size.

    Args:
        in_features: columns.
        out_features: rows.
        size: of the left factor, one more on a side that it does not divide.

    Raises:
        VlkrError: if the product does not cover a matrix of this size.
    """

    def __init__(self, in_features: int, out_features: int, *, size: int = 11) -> None:
        super().__init__(in_features, out_features)
        self.size = size
        rows, columns = (size + (n % size > 0) for n in (out_features, in_features))
        covered = rows * (out_features // size), columns * (in_features // size)
        if covered[0] < out_features or covered[1] < in_features:
            raise VlkrError(
                f"the authors' Kronecker product of size {size} does not cover a matrix "
                f"{out_features}x{in_features}; sides of {size * (size - 1)} and more are covered"
            )
        self.left = nn.Parameter(torch.empty(rows, columns))
        self.right = nn.Parameter(torch.zeros(out_features // size, in_features // size))
        _kaiming(self.left.data)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns ``(out_features, in_features)``; ignores ``weight``."""
        product = torch.einsum("ac,bd->abcd", self.left, self.right).flatten(2, 3).flatten(0, 1)
        return product[: self.out_features, : self.in_features]


def _kaiming(factor: Tensor) -> None:
    """Fills a matrix as :class:`torch.nn.Linear` initializes its weight."""
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def authors_method(name: str, in_features: int, out_features: int) -> Method:
    """Returns a method at the published script's own size.

    Args:
        name: one of :data:`AUTHORS_METHODS`.
        in_features: columns of the matrix.
        out_features: rows.
    """
    short, long = sorted((in_features, out_features))
    rank = int(2 * short * math.sqrt(long) / (short + long)) + 1
    shape = (in_features, out_features)

    def adapter(seed: int) -> Adapter:
        if name == "KRAdapter":
            return KRAdapter(*shape, scale=1.0, rule="balanced")
        if name == "RandLoRA":
            return AuthorsRandLoRA(*shape, rank=max(1, rank // 4), seed=seed)
        if name == "Kronecker":
            return AuthorsKronecker(*shape)
        lora = (
            LoRA(*shape, rank=rank)
            if name == "LoRA"
            else SinLoRA(*shape, rank=rank, frequency=20.0, gain=1.0)
        )
        _kaiming(lora.lora_B.data)
        return lora

    def make(seed: int) -> Adapter:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return adapter(seed)

    return Method(name, sum(p.numel() for p in make(0).parameters()), make)


def authors_rounded(target: Tensor) -> Tensor:
    """Rounds a target to half precision, as the published script does; returns fp32."""
    return target.half().float()
