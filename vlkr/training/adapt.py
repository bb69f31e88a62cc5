"""The few-shot recipe: from names and options to a run folder with a trained adapter."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from vlkr.adapters import (
    add_adapters,
    find_targets,
    match_budget,
    save_adapter,
)
from vlkr.adapters.registry import adapter_class
from vlkr.datasets import DataOptions, Dataset, FewShotDataModule
from vlkr.datasets.pipelines import evaluation_loader
from vlkr.datasets.streaming import PickedSource
from vlkr.datasets.transforms import TrainTransform
from vlkr.errors import VlkrError
from vlkr.evaluation.report import Evaluation, evaluation_markdown
from vlkr.evaluation.zero_shot import evaluate_bundle
from vlkr.files import check_free, exclusive, read_yaml, write_json, write_text
from vlkr.models.classifier import ClassHead
from vlkr.models.clip import ClipBundle, absolute_names, encode_image, image_size
from vlkr.models.loading import load_model
from vlkr.training.checkpoints import check_checkpoint
from vlkr.training.interruption import is_requeued, tells_how_to_go_on
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
class Training:
    """What training left in a run folder.

    Attributes:
        options: of the adapter, its size found where a budget was to be met.
        parameters: trained ones.
        seconds: of training.
        val_acc1: of the last epoch, on the few images set aside; None where there are none.
        device: trained on.
    """

    options: dict[str, Any]
    parameters: int
    seconds: float
    val_acc1: float | None
    device: str


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
        model: ``tiny``, an open_clip name, ``hf-hub:org/repo``, ``local-dir:/path``, or
            ``timm:NAME`` for an image encoder that learns its classes from the shots.
        pretrained: open_clip's tag or a path of weights.
        adapter: method and targets.
        data: dataset, shots and batches.
        optimizer: learning rate and its kin.
        trainer: epochs, precision and device.
        seed: of the split, the initial factors, the order and the augmentation.
        resume: go on from ``checkpoints/last.ckpt`` of an interrupted run; a job that SLURM runs
            again does so by itself.
        force: write into a folder that holds something.

    Raises:
        VlkrError: for any option that does not make sense, before anything is written.
    """
    is_first = _is_first_process()
    checkpoint = output / CHECKPOINT
    optimizer.check()
    trainer.check()
    adapter_class(adapter.name)
    if not 0 <= seed < 2**32:
        raise VlkrError(f"seed {seed} is out of range, expected 0 to {2**32 - 1}")
    resume = resume or (is_requeued() and checkpoint.is_file())
    if resume and not checkpoint.is_file():
        raise VlkrError(f"nothing to resume: no {checkpoint}")
    check_free(
        output,
        force=force or resume or not is_first,
        hint="--resume goes on with it, --force overwrites it",
    )
    dataset = data.load()
    if next(iter(dataset.source("test")), None) is None:
        raise VlkrError(f"dataset {dataset.name!r} has no image in its split 'test'")
    model, pretrained = absolute_names(model, pretrained)
    bundle = load_model(model, pretrained)
    with tells_how_to_go_on(checkpoint), exclusive(output) if is_first else nullcontext():
        training = train(
            output, bundle, dataset, adapter, data, optimizer, trainer, seed, resume=resume
        )
        evaluation = evaluate_bundle(
            bundle, [dataset], batch_size=128, num_workers=data.num_workers, device=training.device
        )
        evaluation.context |= {
            "adapter": adapter.name,
            "options": training.options,
            "parameters": training.parameters,
            **data.context(),
            "classes per step": data.classes_per_step,
            "seed": seed,
            "checkpoint": "last iteration",
        }
        result = AdaptResult(output, bundle, evaluation, training.parameters, training.seconds)
        if is_first:
            write_json(output / "metrics.json", result.to_json())
            write_text(output / "report.md", evaluation_markdown(evaluation))
    return result


def train(
    output: Path,
    bundle: ClipBundle,
    dataset: Dataset,
    adapter: AdapterOptions,
    data: DataOptions,
    optimizer: OptimizerOptions,
    trainer: TrainerOptions,
    seed: int,
    *,
    resume: bool = False,
) -> Training:
    """Adds adapters to a loaded model, trains them and writes the run folder.

    Args:
        output: the run folder; what an earlier run left there is replaced.
        bundle: without adapters; has trained ones afterwards, on the CPU.
        dataset: what ``data`` names.
        adapter: method and targets.
        data: shots and batches.
        optimizer: learning rate and its kin.
        trainer: epochs, precision and device.
        seed: of the split, the initial factors, the order and the augmentation.
        resume: go on from ``checkpoints/last.ckpt``.

    Raises:
        VlkrError: for targets that match nothing, a budget that cannot be met, a class without
            images, or a loss that is not finite.
    """
    checkpoint = output / CHECKPOINT
    L.seed_everything(seed, workers=True, verbose=False)
    options, place = dict(adapter.options), adapter.place()
    if adapter.match is not None:
        budget = match_budget(adapter.name, bundle.model, adapter.match, **place, **options)
        options = budget.options
    config = {
        "model": bundle.name,
        "pretrained": bundle.pretrained,
        "adapter": {**asdict(adapter), "options": options, "match": None},
        "data": _plain(data.absolute()),
        "optimizer": asdict(optimizer),
        "trainer": asdict(trainer),
        "seed": seed,
    }
    if resume:
        _check_same_config(output / "config.yaml", config)
        check_checkpoint(checkpoint)
    find_targets(bundle.model, **place)
    datamodule = FewShotDataModule(
        dataset, data, seed, _train_transform(bundle, data), bundle.preprocess
    )
    if not bundle.has_text:
        bundle.head = _started_head(bundle, dataset, datamodule)
    add_adapters(bundle.model, adapter.name, **place, **options)
    module = FewShotModule(
        bundle, dataset.class_names, dataset.templates, optimizer, seed, data.classes_per_step
    )
    with quiet_lightning():
        lightning_trainer = make_trainer(output, trainer, optimizer.grad_clip)
        if _is_first_process():
            if resume:
                _keep_log(output / "logs" / "csv" / "metrics.csv")
            else:
                _clear(output)
            write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            datamodule.save_split(output / "split.jsonl")
        started = time.perf_counter()
        fit(lightning_trainer, module, datamodule, checkpoint, resume=resume)
        if resume and "val_acc1" not in lightning_trainer.callback_metrics:  # all epochs were done
            lightning_trainer.validate(module, datamodule=datamodule, verbose=False)
    seconds = time.perf_counter() - started
    bundle.model.to("cpu").eval()
    if _is_first_process():
        save_adapter(bundle.model, output / "adapter", base_model=bundle.label, force=True)
        if bundle.head is not None:
            bundle.head.cpu().save(output / "head.safetensors")
    val_acc1 = lightning_trainer.callback_metrics.get("val_acc1")
    return Training(
        options,
        sum(p.numel() for p in module.trained_parameters()),
        seconds,
        None if val_acc1 is None else round(float(val_acc1), 6),
        str(lightning_trainer.strategy.root_device),
    )


def _is_first_process() -> bool:
    """Of several that train side by side."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def _started_head(bundle: ClipBundle, dataset: Dataset, datamodule: FewShotDataModule) -> ClassHead:
    """Class embeddings at the mean features of the images to train on."""
    source = PickedSource(datamodule.pool, datamodule.train_keys)
    loader = evaluation_loader(source, bundle.preprocess, 32, datamodule.options.num_workers)
    head = ClassHead(dataset.class_names, bundle.model_cfg["embed_dim"])
    with torch.no_grad():
        head.start(
            (encode_image(bundle.model, loader.normalize(batch.images)), batch.labels)
            for batch in loader
        )
    return head


def _plain(data: DataOptions) -> dict[str, Any]:
    """What YAML holds as it is."""
    root = None if data.root is None else str(data.root)
    return {**asdict(data), "root": root, "crop_scale": list(data.crop_scale)}


def _train_transform(bundle: ClipBundle, data: DataOptions) -> TrainTransform:
    cfg = bundle.preprocess_cfg
    return TrainTransform(
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
    for name in ("config.yaml", "split.jsonl", "head.safetensors", "metrics.json", "report.md"):
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
