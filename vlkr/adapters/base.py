"""The one contract that every adapter keeps."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module, ABC):
    """Maps a base weight to an adapted one of the same shape, ``weight + delta(weight)``.

    A method is a subclass in a file of its own, plus its name in :mod:`vlkr.adapters.registry`.
    It keeps every keyword-only option of its constructor as an attribute of the same name.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
    """

    #: the option that :func:`vlkr.match_budget` turns to meet a parameter count, if there is one.
    budget_option: ClassVar[str | None] = None
    #: ``forward`` is cheaper than a product with the composed weight, so hosts call it.
    has_low_rank_forward: ClassVar[bool] = False
    #: has ``factor_gradients``, so hosts do without a graph through ``delta``.
    has_factor_gradients: bool = False
    #: the change is one of the bias, ``(out_features)``, and not of the weight.
    adapts_bias: ClassVar[bool] = False
    #: the change depends on the base weight, so that ``delta`` needs it.
    needs_weight: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The change of the base weight.

        Args:
            weight: the base weight ``(out_features, in_features)``; only some methods need it.

        Returns:
            ``(out_features, in_features)``, in the factors' dtype.
        """

    def forward(self, x: Tensor) -> Tensor:
        """The change's product with ``x``.

        Args:
            x: ``(..., in_features)``.

        Returns:
            ``(..., out_features)``.
        """
        return F.linear(x, self.delta().to(x.dtype))

    def add_delta(self, weight: Tensor, base: Tensor, scale: float, out: Tensor) -> None:
        """Writes ``base + scale * delta(weight)`` into ``out``; called without gradients.

        Args:
            weight: the base weight, of the change's shape.
            base: what to add to: ``weight``, or ``out`` itself.
            scale: multiplies the change.
            out: of the change's shape, in fp32 or wider.
        """
        torch.add(base, self.delta(weight), alpha=scale, out=out)

    def factor_gradients(self, grad_delta: Tensor) -> dict[str, Tensor]:
        """The parameters' gradients by name, for a method that is faster here than autograd.

        Args:
            grad_delta: the change's gradient, contiguous along the longer side.
        """
        raise NotImplementedError

    def init_from_weight(self, weight: Tensor) -> None:
        """Sets what depends on the base weight, so that the change is zero on it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the change."""
        return (self.out_features,) if self.adapts_bias else (self.out_features, self.in_features)

    def options(self) -> dict[str, Any]:
        """The constructor's options, from which an equal adapter can be made."""
        return {name: getattr(self, name) for name in option_defaults(type(self))}

    @classmethod
    def num_parameters(cls, in_features: int, out_features: int, **options: Any) -> int:
        """Trainable parameters for a weight of this shape."""
        with torch.device("meta"):
            adapter = cls(in_features, out_features, **options)
        return sum(p.numel() for p in adapter.parameters())

    def extra_repr(self) -> str:
        """Sizes and options, as :class:`torch.nn.Linear` prints them."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return ", ".join(f"{key}={value}" for key, value in {**sizes, **self.options()}.items())


def option_defaults(method: type[Adapter]) -> dict[str, Any]:
    """The keyword-only options of a method's constructor, with their defaults."""
    parameters = inspect.signature(method.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def random_basis(*shape: int, seed: int) -> Tensor:
    """A frozen random tensor of unit variance that depends on its shape and the seed alone.

    Adapters that share such a basis need not store it: it is made again at load.
    """
    if torch.empty(0).device.type == "meta":
        return torch.empty(*shape)
    generator = torch.Generator().manual_seed(seed)
    bound = 3**0.5
    return torch.empty(*shape, device="cpu").uniform_(-bound, bound, generator=generator)
