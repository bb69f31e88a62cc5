"""The few-shot recipe: from names and options to a run folder with a trained adapter."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from rich.console import Console

from vlkr.adapters import (
    adapter_parameters,
    add_adapters,
    find_targets,
    match_budget,
    save_adapter,
)
from vlkr.adapters.registry import adapter_class
from vlkr.datasets import DataOptions, FewShotDataModule
from vlkr.datasets.pipelines import train_transform
from vlkr.errors import VlkrError
from vlkr.evaluation.report import Evaluation, evaluation_markdown
from vlkr.evaluation.zero_shot import evaluate_bundle
from vlkr.files import check_free, read_yaml, write_json, write_text
from vlkr.models.clip import ClipBundle, absolute_names, image_size, load_clip
from vlkr.training.module import FewShotModule
from vlkr.training.optim import OptimizerOptions
from vlkr.training.trainer import (
    CHECKPOINT,
    TrainerOptions,
    fit,
    make_trainer,
    quiet_lightning,
)

_ANY_ON_RESUME = {"data.num_workers", "trainer.accelerator", "trainer.progress"}


@dataclass(frozen=True)
class AdapterOptions:
    """The adapter of a run.

    Args:
        name: of the method: ``kradapter``, ``lora``, ``dora``, ...; an unknown one lists all.
        targets: short names (``q k v qkv out fc1 fc2``) or shell patterns of module names.
        towers: ``visual``, ``text`` or both.
        blocks: indices of transformer blocks, negative from the end; none takes all.
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


@dataclass
class AdaptResult:
    """What came out of a run.

    Attributes:
        output: the run folder.
        bundle: the model with trained adapters.
        evaluation: on the home test split.
        parameters: trained ones.
        seconds: of training.
    """

    output: Path
    bundle: ClipBundle
    evaluation: Evaluation
    parameters: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The run's ``metrics.json``."""
        return self.evaluation.to_json() | {"train_seconds": round(self.seconds, 1)}

    def show(self, console: Console) -> None:
        """Prints the accuracy at home and where the run lies."""
        self.evaluation.show(console)
        console.print(
            f"{self.parameters:,} parameters trained in {self.seconds:.0f} s. Run: {self.output}",
            highlight=False,
            markup=False,
        )


def adapt(
    output: Path,
    model: str = "tiny",
    pretrained: str | None = None,
    adapter: AdapterOptions = AdapterOptions(),
    data: DataOptions = DataOptions(),
    optimizer: OptimizerOptions = OptimizerOptions(),
    trainer: TrainerOptions = TrainerOptions(),
    seed: int = 1,
    resume: bool = False,
    force: bool = False,
) -> AdaptResult:
    """Adapts a CLIP model to a few labelled images per class and writes a run folder.

    The folder holds the resolved ``config.yaml``, ``adapter/``, ``metrics.json``, ``report.md``,
    ``logs/`` (CSV and TensorBoard) and ``checkpoints/last.ckpt``, written after each epoch. The
    adapter is that of the last iteration.

    Args:
        output: the run folder.
        model: ``tiny``, an open_clip name, ``hf-hub:org/repo`` or ``local-dir:/path``.
        pretrained: open_clip's tag or a path of weights.
        adapter: method and targets.
        data: dataset, shots and batches.
        optimizer: learning rate and its kin.
        trainer: epochs, precision and device.
        seed: of the split, the initial factors, the order and the augmentation.
        resume: go on from ``checkpoints/last.ckpt`` of an interrupted run.
        force: write into a folder that holds something.

    Raises:
        VlkrError: for any option that does not make sense, before anything is written.
    """
    checkpoint = output / CHECKPOINT
    optimizer.check()
    trainer.check()
    adapter_class(adapter.name)
    if not 0 <= seed < 2**32:
        raise VlkrError(f"seed {seed} is out of range, expected 0 to {2**32 - 1}")
    if resume and not checkpoint.is_file():
        raise VlkrError(f"nothing to resume: no {checkpoint}")
    check_free(
        output, force=force or resume, hint="--resume goes on with it, --force overwrites it"
    )
    dataset = data.load()
    if next(iter(dataset.source("test")), None) is None:
        raise VlkrError(f"dataset {dataset.name!r} has no image in its split 'test'")
    model, pretrained = absolute_names(model, pretrained)
    bundle = load_clip(model, pretrained)
    L.seed_everything(seed, workers=True, verbose=False)
    options, place = dict(adapter.options), adapter.place()
    if adapter.match is not None:
        budget = match_budget(adapter.name, bundle.model, adapter.match, **place, **options)
        options = budget.options
    config = {
        "model": model,
        "pretrained": pretrained,
        "adapter": {**asdict(adapter), "options": options, "match": None},
        "data": _plain(asdict(data)),
        "optimizer": asdict(optimizer),
        "trainer": asdict(trainer),
        "seed": seed,
    }
    if resume:
        _check_same_config(output / "config.yaml", config)
    find_targets(bundle.model, **place)
    datamodule = FewShotDataModule(
        dataset, data, seed, _train_transform(bundle, data), bundle.preprocess
    )
    add_adapters(bundle.model, adapter.name, **place, **options)
    module = FewShotModule(
        bundle, dataset.class_names, dataset.templates, optimizer, seed, data.classes_per_step
    )
    with quiet_lightning():
        lightning_trainer = make_trainer(output, trainer, optimizer.grad_clip)
        if resume:
            _keep_log(output / "logs" / "csv" / "metrics.csv")
        else:
            _clear(output)
        write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        started = time.perf_counter()
        fit(lightning_trainer, module, datamodule, checkpoint, resume=resume)
    seconds = time.perf_counter() - started
    bundle.model.to("cpu").eval()
    save_adapter(bundle.model, output / "adapter", base_model=bundle.label, force=True)
    evaluation = evaluate_bundle(
        bundle,
        [dataset],
        batch_size=128,
        num_workers=data.num_workers,
        device=str(lightning_trainer.strategy.root_device),
    )
    evaluation.context |= {
        "adapter": adapter.name,
        "options": options,
        "parameters": sum(p.numel() for p in adapter_parameters(bundle.model)),
        "shots": data.shots,
        "classes per step": data.classes_per_step,
        "seed": seed,
        "checkpoint": "last iteration",
    }
    result = AdaptResult(output, bundle, evaluation, evaluation.context["parameters"], seconds)
    write_json(output / "metrics.json", result.to_json())
    write_text(output / "report.md", evaluation_markdown(evaluation))
    return result


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    root = data["root"]
    return {
        **data,
        "root": str(Path(root).resolve()) if root else None,
        "crop_scale": list(data["crop_scale"]),
    }


def _train_transform(bundle: ClipBundle, data: DataOptions) -> Any:
    cfg = bundle.preprocess_cfg
    return train_transform(
        image_size(bundle),
        cfg["mean"],
        cfg["std"],
        cfg["interpolation"],
        data.crop_scale,
        data.flip,
    )


def _keep_log(log: Path) -> None:
    """Renames the CSV log of the part before, which Lightning would delete."""
    if log.is_file():
        log.rename(log.with_name(f"metrics-{len(list(log.parent.glob('*.csv')))}.csv"))


def _clear(output: Path) -> None:
    """Removes what an earlier run left, and nothing else."""
    for name in ("adapter", "logs", Path(CHECKPOINT).parts[0]):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("config.yaml", "metrics.json", "report.md"):
        (output / name).unlink(missing_ok=True)


def _check_same_config(path: Path, config: dict[str, Any]) -> None:
    before = _flat(read_yaml(path))
    for key, value in _flat(config).items():
        if before.get(key) != value and key not in _ANY_ON_RESUME:
            raise VlkrError(
                f"cannot resume: {key} is {value} now and was {before.get(key)} in {path}"
            )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and key != "options"
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
