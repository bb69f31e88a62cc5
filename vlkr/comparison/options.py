"""The options that all grids share. Their help needs them, so nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vlkr.config import OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig

ZERO_SHOT, PROBE = "zero-shot", "probe"
Selection = Literal["training-domain", "leave-one-domain-out", "oracle"]
"""How ``dg`` chooses settings."""


@dataclass(frozen=True)
class MethodConfig:
    """A method of a grid.

    Args:
        name: ``zero-shot``, ``probe`` (logistic regression on frozen image features), or an
            adapter such as ``kradapter``; ``full`` trains the same weights fully.
        label: name in tables; by default the name and its options.
        options: options of the adapter, e.g. ``{rank: 8}``.
        lrs: learning rates to choose from, in place of the grid's.
        epochs: numbers of epochs to choose from, in place of the grid's.
    """

    name: str
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lrs: list[float] | None = None
    epochs: list[int] | None = None


@dataclass(frozen=True)
class GridConfig:
    """The options that ``compare``, ``dg`` and ``transfer`` have in common.

    Args:
        model: ``tiny``, an open_clip name, ``hf-hub:org/repo``, ``local-dir:/path`` or
            ``timm:NAME``.
        pretrained: open_clip tag or path of weights.
        methods: names, or mappings with ``name``, ``label``, ``options``, ``lrs``, ``epochs``.
        reference: label of the method that the others are compared with.
        budget: ``match METHOD`` gives every adapter whose size can be chosen that method's
            parameter count; ``own`` leaves all as they are.
        seeds: random seeds for split, initialization, shuffling and augmentation.
        lrs: learning rates to choose from on validation; ``optimizer.lr`` by default.
        epochs: numbers of epochs to choose from on validation; ``trainer.epochs`` by default.
        steps_per_shot: train for this many steps times shots, spread over the epochs, in place of
            ``data.min_steps_per_epoch``.
        targets: short names (``q k v qkv out fc1 fc2``) or shell patterns of module names.
        towers: one or more of ``visual``, ``text`` and, for CoCa, ``decoder``.
        blocks: indices of transformer blocks, negative from the end; all by default.
        data: dataset, shots and batches.
        optimizer: optimizer options.
        trainer: precision and device.
        jobs: processes, each with one thread; 1 computes in this one, 0 only reports what is done.
        launcher: ``local``, or a command for a scheduler that gets each cell's own command in
            place of ``{command}``, and its name in place of ``{cell}``:
            ``sbatch --job-name {cell} --wrap {command}``.
        cell: compute only these cells of the plan in ``output``, or ``all`` for every one that is
            left; needs no other option.
        dry_run: print the plan, compute nothing.
        force: recompute cells whose configuration has changed.
    """

    model: str = "tiny"
    pretrained: str | None = None
    methods: list[MethodConfig | str] = field(
        default_factory=lambda: [ZERO_SHOT, PROBE, "kradapter", "lora", "full"]
    )
    reference: str = "lora"
    budget: str = "match kradapter"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    lrs: list[float] | None = None
    epochs: list[int] | None = None
    steps_per_shot: int | None = None
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out", "fc1", "fc2"])
    towers: list[str] = field(default_factory=lambda: ["visual", "text"])
    blocks: list[int] | None = None
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    jobs: int = 1
    launcher: str = "local"
    cell: list[str] | None = None
    dry_run: bool = False
    force: bool = False
