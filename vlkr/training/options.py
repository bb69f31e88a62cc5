"""The options of a run beside its data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vlkr.errors import VlkrError

_MAX_LR = 1e30  # a step of AdamW beyond it is no fp32 number


@dataclass(frozen=True)
class AdapterOptions:
    """The adapter of a run.

    Args:
        name: of the method: ``kradapter``, ``lora``, ``dora``, ...; an unknown one lists all.
        targets: short names (``q k v qkv out fc1 fc2``) or shell patterns of module names.
        towers: one or more of ``visual``, ``text`` and, of CoCa, ``decoder``.
        blocks: indices of transformer blocks, negative from the end; all by default.
        options: of the method, e.g. ``{rank: 8}``.
        match: a method whose parameter count is to be met by choosing this one's size.
    """

    name: str = "kradapter"
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out", "fc1", "fc2"])
    towers: list[str] = field(default_factory=lambda: ["visual", "text"])
    blocks: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    match: str | None = None

    def place(self) -> dict[str, Any]:
        """Where the adapters go, as keyword arguments of :func:`vlkr.add_adapters`."""
        return {"targets": tuple(self.targets), "towers": tuple(self.towers), "blocks": self.blocks}


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with a warm-up and a cosine schedule down to zero, stepped every iteration.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled, on adapter factors.
        warmup_steps: iterations of linear warm-up.
        grad_clip: largest gradient norm; 0 switches clipping off.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 0
    grad_clip: float = 1.0

    def check(self) -> None:
        """Raises :class:`VlkrError` for a number out of range."""
        if not 0 < self.lr <= _MAX_LR:
            raise VlkrError(
                f"optimizer.lr {self.lr} is out of range, expected above 0, at most {_MAX_LR:g}"
            )
        for option in ("weight_decay", "warmup_steps", "grad_clip"):
            value = getattr(self, option)
            if not 0 <= value < math.inf:
                raise VlkrError(f"optimizer.{option} {value} is out of range, expected at least 0")


@dataclass(frozen=True)
class TrainerOptions:
    """How long and where to train.

    Args:
        epochs: passes over the (oversampled) training images.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        accelerator: ``auto``, ``cpu``, ``gpu``, as Lightning's Trainer names them.
        devices: processes that train side by side, each on a device of its own (DDP); every one
            takes ``data.batch_size`` images a step.
        num_nodes: machines, when a cluster's scheduler starts one process a device.
        accumulate_grad_batches: batches per optimizer step.
        progress: show a progress bar.
    """

    epochs: int = 10
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    accumulate_grad_batches: int = 1
    progress: bool = True

    def check(self) -> None:
        """Raises :class:`VlkrError` for a number out of range."""
        for option in ("epochs", "devices", "num_nodes", "accumulate_grad_batches"):
            if getattr(self, option) < 1:
                raise VlkrError(
                    f"trainer.{option} {getattr(self, option)} is too small, expected at least 1"
                )
