"""The contract that every adapter method keeps."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkr.errors import VlkrError


class Adapter(nn.Module, ABC):
    """Maps a base weight to an adapted one of the same shape, ``weight + delta(weight)``.

    A method is a subclass in a file of its own, plus its name in :mod:`vlkr.adapters.registry`.
    Hosts, files and budgets rely on these rules:

    - Options are keyword-only arguments with defaults of the constructor, each a bool, int, float
      or str (None stands for a float) that is kept as an attribute of the same name.
    - Trainable parameters are direct attributes, never those of a submodule. Only they are saved:
      buffers are non-persistent and follow from the options.
    - ``delta`` is a deterministic function of the parameters, buffers and base weight, and writes
      no attribute. It is called again in backward, on a shallow copy with the forward's parameters.
    - ``delta`` is zero after ``init_from_weight``, so that adding an adapter changes no output.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
    """

    #: the option that :func:`vlkr.match_budget` chooses to meet a parameter count, if there is one.
    budget_option: ClassVar[str | None] = None
    #: ``forward`` is cheaper than a product with the composed weight, so hosts call it.
    has_low_rank_forward: ClassVar[bool] = False
    #: ``factor_gradients`` is implemented, so hosts need no graph through ``delta``.
    has_factor_gradients: bool = False
    #: ``fit_to`` is implemented.
    has_closed_form: bool = False
    #: updates the bias, ``(out_features)``, not the weight.
    adapts_bias: ClassVar[bool] = False
    #: ``delta`` depends on the base weight.
    needs_weight: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Returns the update of the base weight.

        Args:
            weight: the base weight ``(out_features, in_features)``, needed if ``needs_weight``.

        Returns:
            ``(out_features, in_features)``, in the factors' dtype.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies ``x`` by the weight update.

        Args:
            x: ``(..., in_features)``.

        Returns:
            ``(..., out_features)``.
        """
        return F.linear(x, self.delta().to(x.dtype))

    def add_delta(self, weight: Tensor, base: Tensor, scale: float, out: Tensor) -> None:
        """Writes ``base + scale * delta(weight)`` into ``out``; called without gradients.

        Args:
            weight: the base weight, of the update's shape.
            base: what to add to: ``weight``, or ``out`` itself.
            scale: multiplies the update.
            out: of the update's shape, in fp32 or wider.
        """
        torch.add(base, self.delta(weight), alpha=scale, out=out)

    def factor_gradients(self, grad_delta: Tensor) -> dict[str, Tensor]:
        """Returns the parameters' gradients by name, where that is faster than autograd.

        Args:
            grad_delta: gradient of the update, contiguous along the longer side.
        """
        raise NotImplementedError

    def init_from_weight(self, weight: Tensor) -> None:
        """Sets the parameters that depend on the base weight, such that the update is zero."""

    def fit_to(self, delta: Tensor) -> None:
        """Sets the parameters to the nearest update in the Frobenius norm, in closed form.

        Args:
            delta: a weight update ``(out_features, in_features)``.

        Raises:
            VlkrError: if the update is always zero.
        """
        raise NotImplementedError

    def _unscaled(self, delta: Tensor, scale: float) -> Tensor:
        if scale == 0:
            raise VlkrError(f"{self} is always zero, so it cannot be fitted")
        return delta / scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the update."""
        return (self.out_features,) if self.adapts_bias else (self.out_features, self.in_features)

    def options(self) -> dict[str, Any]:
        """Returns the constructor's options, from which an equal adapter can be made."""
        return {name: getattr(self, name) for name in option_defaults(type(self))}

    @classmethod
    def num_parameters(cls, in_features: int, out_features: int, **options: Any) -> int:
        """Returns the number of trainable parameters for a weight of this shape."""
        with torch.device("meta"):
            adapter = cls(in_features, out_features, **options)
        return sum(p.numel() for p in adapter.parameters())

    def extra_repr(self) -> str:
        """Returns sizes and options, as :class:`torch.nn.Linear` prints them."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return ", ".join(f"{key}={value}" for key, value in {**sizes, **self.options()}.items())


def option_defaults(method: type[Adapter]) -> dict[str, Any]:
    """Returns the options of a method's constructor with their defaults."""
    parameters = inspect.signature(method.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def random_basis(*shape: int, seed: int) -> Tensor:
    """Returns a random tensor of unit variance that depends only on its shape and the seed.

    Adapters that share such a frozen basis need not store it: it is made again at load.
    """
    if torch.empty(0).device.type == "meta":
        return torch.empty(*shape)
    generator = torch.Generator().manual_seed(seed)
    bound = 3**0.5
    return torch.empty(*shape, device="cpu").uniform_(-bound, bound, generator=generator)
