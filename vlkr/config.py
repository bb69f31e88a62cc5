"""The options of a run, except for its data: plain dataclasses, whose ranges pydantic checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from vlkr.validation import check_ranges

_Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_AtLeastOne = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter of a run.

    Args:
        name: adapter method: ``kradapter``, ``lora``, ``dora``, ...; an unknown one lists all.
        targets: short names (``q k v qkv out fc1 fc2``) or shell patterns of module names.
        towers: one or more of ``visual``, ``text`` and, for CoCa, ``decoder``.
        blocks: indices of transformer blocks, negative from the end; all by default.
        options: method options, e.g. ``{rank: 8}``.
        match: size this adapter to match the named method's parameter count.
    """

    name: str = "kradapter"
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out", "fc1", "fc2"])
    towers: list[str] = field(default_factory=lambda: ["visual", "text"])
    blocks: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    match: str | None = None

    def place(self) -> dict[str, Any]:
        """Returns the keyword arguments of :func:`vlkr.add_adapters` that say what is adapted."""
        return {"targets": tuple(self.targets), "towers": tuple(self.towers), "blocks": self.blocks}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine schedule to zero, stepped every iteration.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled weight decay on adapter factors.
        warmup_steps: iterations of linear warm-up.
        grad_clip: largest gradient norm; 0 disables clipping.
    """

    # A step of AdamW beyond 1e30 is not an fp32 number.
    lr: Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)] = 1e-3
    weight_decay: _Finite = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    grad_clip: _Finite = 1.0

    def check(self) -> None:
        """Raises :class:`VlkrError` for a number out of range."""
        check_ranges(self, "optimizer")


@dataclass(frozen=True)
class TrainerConfig:
    """How long and where to train.

    Args:
        epochs: passes over the (oversampled) training images.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        accelerator: ``auto``, ``cpu``, ``gpu``, as Lightning's Trainer names them.
        devices: training processes per machine, each on its own device (DDP) and with
            ``data.batch_size`` images per step.
        num_nodes: machines, where a cluster's scheduler starts one process per device.
        accumulate_grad_batches: batches per optimizer step.
        progress: show a progress bar.
    """

    epochs: _AtLeastOne = 10
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: _AtLeastOne = 1
    num_nodes: _AtLeastOne = 1
    accumulate_grad_batches: _AtLeastOne = 1
    progress: bool = True

    def check(self) -> None:
        """Raises :class:`VlkrError` for a number out of range."""
        check_ranges(self, "trainer")
