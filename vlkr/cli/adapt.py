"""``vlkr adapt`` and ``vlkr project``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkr.cli.options import Switch, typed
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig


def adapt(
    *,
    output: Path,
    model: str = "tiny",
    pretrained: str | None = None,
    adapter: AdapterConfig = AdapterConfig(),
    data: DataConfig = DataConfig(),
    optimizer: OptimizerConfig = OptimizerConfig(),
    trainer: TrainerConfig = TrainerConfig(),
    seed: int = 1,
    resume: Switch = False,
    force: Switch = False,
) -> Any:
    """Adapts a CLIP model to a few labeled images per class and writes a run folder.

    The folder holds the resolved ``config.yaml``, ``adapter/``, ``metrics.json``, ``report.md``,
    ``logs/`` (CSV and TensorBoard) and ``checkpoints/last.ckpt``, written after each epoch. The
    adapter is that of the last iteration.

    Args:
        output: run folder to write.
        model: ``tiny``, an open_clip name, ``hf-hub:org/repo``, ``local-dir:/path``, or
            ``timm:NAME`` for an image encoder that learns its classes from the shots.
        pretrained: open_clip tag or path of weights.
        adapter: method and targets.
        data: dataset, shots and batches.
        optimizer: optimizer options.
        trainer: epochs, precision and device.
        seed: random seed for split, initialization, shuffling and augmentation.
        resume: continue from ``checkpoints/last.ckpt`` of an interrupted run; a job that SLURM
            requeues does so by itself.
        force: allow a non-empty output folder.
    """
    from vlkr.training.recipe import adapt

    return adapt(
        output, model, pretrained, typed(adapter), data, optimizer, trainer, seed, resume, force
    )


def project(
    *,
    output: Path,
    base: str,
    tuned: str,
    base_pretrained: str | None = None,
    tuned_pretrained: str | None = None,
    adapter: AdapterConfig = AdapterConfig(),
    force: Switch = False,
) -> Any:
    """Finds the adapter that is nearest to a full fine-tune and writes it as an adapter folder.

    KRAdapter's is the truncated SVD of each row, LoRA's that of the matrix. What the fine-tune
    changed elsewhere (norms, embeddings, biases) is left out.

    Args:
        output: adapter folder to write.
        base: base model, named as for ``vlkr adapt``.
        tuned: fine-tuned model.
        base_pretrained: open_clip tag or path of weights of the base model.
        tuned_pretrained: open_clip tag or path of weights of the fine-tuned model.
        adapter: method (``kradapter`` or ``lora``), its options and targets.
        force: replace an existing adapter.
    """
    from vlkr.training.recipe import project_fine_tune

    return project_fine_tune(
        output, base, tuned, base_pretrained, tuned_pretrained, typed(adapter), force
    )
