"""The published benchmark of KRAdapter (arXiv 2508.00230, section 4) as its script defines it.

Settings of the script: matrices 1024x768 in half precision, AdamW with learning rate 0.1 for 300
iterations, every low-rank factor Kaiming-uniform (``a=sqrt(5)``), and budgets that are not equal:
at this size LoRA and SinLoRA 50,176 parameters, KRAdapter 49,152, RandLoRA 86,025, Kronecker 6,561.
One definition is not repeated: a change whose rows exceed the target's is cut here, where the
script stopped with an error that it swallowed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.lora import LoRA
from vlkr.adapters.randlora import RandLoRA
from vlkr.adapters.sinlora import SinLoRA
from vlkr.approximation.methods import Method, kaiming
from vlkr.errors import VlkrError

AUTHORS_METHODS = ("LoRA", "SinLoRA", "KRAdapter", "RandLoRA", "Kronecker")
AUTHORS_TARGETS = (
    "gaussian",
    "sparse",
    "whitened",
    "low-rank",
    "high-frequency-aliased",
    "low-frequency",
)


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
        self.B = _unit(torch.rand(long, bases, rank, generator=generator))
        self.A = _unit(torch.rand(rank, short, generator=generator))
        self.randlora_lambda = nn.Parameter(torch.full((bases, rank), 1 / bases))
        self.randlora_gamma = nn.Parameter(torch.zeros(bases, short))


def _unit(uniform: Tensor) -> Tensor:
    centred = 2 * uniform - 1
    return centred / centred.std()


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
        if rows * (out_features // size) < out_features or columns * (in_features // size) < (
            in_features
        ):
            raise VlkrError(
                f"the authors' Kronecker product of size {size} does not cover a matrix "
                f"{out_features}x{in_features}; sides of {size * (size - 1)} and more are covered"
            )
        self.left = nn.Parameter(torch.empty(rows, columns))
        self.right = nn.Parameter(torch.zeros(out_features // size, in_features // size))
        kaiming(self.left.data)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """``(out_features, in_features)``; ignores ``weight``."""
        product = torch.einsum("ac,bd->abcd", self.left, self.right).flatten(2, 3).flatten(0, 1)
        return product[: self.out_features, : self.in_features]


def authors_method(name: str, in_features: int, out_features: int) -> Method:
    """A method at the script's own size.

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
        kaiming(lora.lora_B.data)
        return lora

    def make(seed: int) -> Adapter:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return adapter(seed)

    return Method(name, sum(p.numel() for p in make(0).parameters()), make)


def authors_target(target: Tensor) -> Tensor:
    """The script's rounding of a target to half precision, as fp32."""
    return target.half().float()
