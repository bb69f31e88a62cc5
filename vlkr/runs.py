"""Run folders: the configuration of a run and the files that training leaves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from vlkr.adapters import load_adapter, match_budget, save_adapter, set_adapter_scale
from vlkr.adapters.inject import injected_adapters
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig, Dataset
from vlkr.datasets.splits import validation_source
from vlkr.errors import VlkrError
from vlkr.files import (
    check_free,
    differences,
    exclusive,
    flattened,
    read_json,
    read_yaml,
    sha256_of,
    write_json,
    write_text,
)
from vlkr.models.classifier import ClassHead
from vlkr.models.clip import ClipBundle
from vlkr.models.loading import load_model
from vlkr.runtime import is_first_process
from vlkr.validation import from_plain

CHECKPOINT = Path("checkpoints", "last.ckpt")
# Options that change how a run is computed and not what it learns.
NEUTRAL = frozenset(
    {
        "data.num_workers",
        "data.memory_gb",
        "data.max_bad",
        "trainer.accelerator",
        "trainer.progress",
    }
)
# Neutral options, and others in which runs of one method may differ.
_NOT_OF_THE_METHOD = {*NEUTRAL, "seed", "data.name", "data.root", "data.allow_commands"}
_REQUIRED = {
    "": ("model", "pretrained", "seed"),
    "adapter": ("name", "options"),
    "data": ("name", "root", "shots", "templates", "test_fraction"),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    Attributes:
        model: ``tiny``, an open_clip name, ``hf-hub:...``, ``local-dir:...`` or ``timm:...``.
        pretrained: open_clip's tag, or a path of weights.
        adapter: method and targets.
        data: dataset, shots and batches.
        optimizer: optimizer options.
        trainer: epochs, precision and device.
        seed: random seed for split, initialization, shuffling and augmentation.
    """

    model: str = "tiny"
    pretrained: str | None = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 1

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        """Reads a run's ``config.yaml``; most missing options get their defaults.

        Raises:
            VlkrError: if the file cannot be read, or a value is not valid.
        """
        content = read_yaml(path)
        for section, keys in _REQUIRED.items():
            for key in keys:
                part = content.get(section, {}) if section else content
                if not isinstance(part, dict) or key not in part:
                    name = f"{section}.{key}".lstrip(".")
                    raise VlkrError(f"{path} is not a run's configuration: it lacks {name}")
        try:
            return from_plain(cls, content, "run")
        except VlkrError as error:
            reason = str(error).removeprefix("run.")
            raise VlkrError(f"{path} is not a run's configuration: {reason}") from error

    def to_plain(self) -> dict[str, Any]:
        """Returns nested mappings of strings, numbers and lists, as YAML holds them."""
        root = None if self.data.root is None else str(self.data.root)
        data = {**asdict(self.data), "root": root, "crop_scale": list(self.data.crop_scale)}
        return {**asdict(self), "data": data}

    def write(self, path: Path) -> None:
        """Writes ``config.yaml``."""
        write_text(path, yaml.safe_dump(self.to_plain(), sort_keys=False))

    def check(self) -> None:
        """Raises :class:`VlkrError` for a number out of range; loading checks data options."""
        self.optimizer.check()
        self.trainer.check()
        if not 0 <= self.seed < 2**32:
            raise VlkrError(f"seed {self.seed} is out of range, expected 0 to {2**32 - 1}")

    def resolved(
        self, model: nn.Module, match_options: Mapping[str, Any] | None = None
    ) -> RunConfig:
        """Returns the configuration with the adapter's size chosen and the data's paths absolute.

        Args:
            model: without adapters; only its shapes are read.
            match_options: options of the method that ``adapter.match`` names.

        Raises:
            VlkrError: for a budget that cannot be matched.
        """
        adapter = self.adapter
        if adapter.match is not None:
            budget = match_budget(
                adapter.name,
                model,
                adapter.match,
                **adapter.place(),
                to_options=dict(match_options or {}),
                **adapter.options,
            )
            adapter = replace(adapter, options=budget.options, match=None)
        return replace(self, adapter=adapter, data=self.data.absolute())

    def changes(self, other: RunConfig) -> dict[str, str]:
        """Describes, by dotted name, the options in which ``other`` was different.

        Options that do not change what a run learns (:data:`NEUTRAL`) are left out.
        """
        return {
            key: change
            for key, change in differences(other.to_plain(), self.to_plain()).items()
            if key not in NEUTRAL
        }

    def context(self, scale: float = 1.0) -> dict[str, Any]:
        """Returns what a run's numbers depend on besides the model, for captions.

        Args:
            scale: factor of the adapter's weight update.
        """
        return {
            "adapter": self.adapter.name,
            "options": self.adapter.options,
            "adapter scale": None if scale == 1 else scale,
            **self.data.context(),
            "seed": self.seed,
            "checkpoint": "last iteration",
        }


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run; nothing else reads or writes these files.

    Attributes:
        path: the folder.
        config: the run's configuration, as its ``config.yaml`` holds it.
    """

    path: Path
    config: RunConfig

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens a finished run.

        Raises:
            VlkrError: if the folder is not a finished run.
        """
        if not path.is_dir():
            raise VlkrError(f"no run folder at {path}")
        config = path / "config.yaml"
        if not config.is_file() or not (path / "adapter").is_dir():
            has_checkpoints = (path / CHECKPOINT.parent).is_dir()
            hint = "; `vlkr adapt --resume` continues it" if has_checkpoints else ""
            raise VlkrError(
                f"{path} is not a finished run: expected config.yaml and adapter/ in it{hint}"
            )
        return cls(path, RunConfig.read(config))

    @classmethod
    @contextmanager
    def start(
        cls, path: Path, config: RunConfig, *, resume: bool = False, force: bool = False
    ) -> Iterator[RunFolder]:
        """Locks the folder for a run within the block; nothing is written yet.

        Of several training processes only the first one holds the lock.

        Args:
            path: the run folder.
            config: resolved configuration; to resume, it may differ in :data:`NEUTRAL` only.
            resume: continue from the checkpoint.
            force: allow a non-empty folder.

        Raises:
            VlkrError: if the folder is in use or not empty, or cannot be resumed.
        """
        folder = cls(path, config)
        is_first = is_first_process()
        folder.check_output(resume=resume, force=force)
        with exclusive(path) if is_first else nullcontext():
            if resume:
                written = RunConfig.read(path / "config.yaml")
                for change in config.changes(written).values():
                    raise VlkrError(f"cannot resume: {change} in {path / 'config.yaml'}")
            yield folder

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.path / CHECKPOINT

    @property
    def log_dir(self) -> Path:
        """The folder of CSV and TensorBoard logs."""
        return self.path / "logs"

    @property
    def split(self) -> Path:
        """The file that lists the training and validation images."""
        return self.path / "split.jsonl"

    def check_output(self, *, resume: bool, force: bool) -> None:
        """Raises :class:`VlkrError` if a run cannot be started or resumed in this folder."""
        if resume and not self.checkpoint.is_file():
            raise VlkrError(f"nothing to resume: no {self.checkpoint}")
        check_free(
            self.path,
            force=force or resume or not is_first_process(),
            hint="--resume continues it, --force overwrites it",
        )

    def begin(self, *, resume: bool) -> None:
        """Removes an earlier run's files, or keeps them with ``resume``, and writes the config."""
        if resume:
            log = self.log_dir / "csv" / "metrics.csv"
            if log.is_file():  # Lightning would delete it
                log.rename(log.with_name(f"metrics-{len(list(log.parent.glob('*.csv')))}.csv"))
        else:
            for name in ("adapter", self.log_dir.name, self.checkpoint.parent.name):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("config.yaml", "head.safetensors", "metrics.json", "report.md"):
                (self.path / name).unlink(missing_ok=True)
            self.split.unlink(missing_ok=True)
        self.config.write(self.path / "config.yaml")

    def save(self, bundle: ClipBundle) -> None:
        """Writes the trained adapter, and the class head of a model without a text tower.

        Args:
            bundle: the model with adapters; it is moved to the CPU.
        """
        bundle.model.to("cpu")
        save_adapter(bundle.model, self.path / "adapter", base_model=bundle.label, force=True)
        if bundle.head is not None:
            bundle.head.cpu().save(self.path / "head.safetensors")

    def save_scaled(self, bundle: ClipBundle, scale: float) -> None:
        """Writes the run with a scaled adapter to this folder.

        The metrics and checkpoints of a previous run in this folder are removed.

        Args:
            bundle: the run's model; its adapter keeps the scale.
            scale: factor of the adapter's weight update.
        """
        (self.path / "metrics.json").unlink(missing_ok=True)
        shutil.rmtree(self.checkpoint.parent, ignore_errors=True)
        set_adapter_scale(bundle.model, scale)
        self.save(bundle)
        self.config.write(self.path / "config.yaml")

    def load_model(self) -> ClipBundle:
        """Loads the adapted model, in eval mode on the CPU.

        Raises:
            VlkrError: if its base model has changed, or a file is damaged.
        """
        bundle = load_model(self.config.model, self.config.pretrained)
        if not bundle.has_text:
            bundle.head = ClassHead.load(self.path / "head.safetensors")
        load_adapter(bundle.model, self.path / "adapter")
        bundle.model.eval()
        return bundle

    def dataset(self) -> Dataset:
        """Returns the run's own dataset, with its prompts and its split."""
        return self.config.data.load()

    def validation(self, templates: Sequence[str] | None = None) -> Dataset | None:
        """Returns the images that the run validated with, as the split ``"val"`` of its dataset.

        Args:
            templates: templates that replace the run's.

        Returns:
            None if every image of the classes was trained on.
        """
        dataset = validation_set(self.config.data, self.config.seed)
        return None if dataset is None else dataset.with_templates(templates)

    def write_metrics(self, metrics: Mapping[str, Any], report: str) -> None:
        """Writes ``metrics.json`` and ``report.md``."""
        write_json(self.path / "metrics.json", metrics)
        write_text(self.path / "report.md", report)

    def metrics(self) -> dict[str, Any] | None:
        """Returns what ``metrics.json`` holds; None if the run was not evaluated."""
        path = self.path / "metrics.json"
        return read_json(path) if path.is_file() else None

    def fingerprint(self) -> str:
        """Returns hashes of the learned weights, which tie a result to the folder's state."""
        files = (
            self.path / "adapter" / "adapter_config.json",
            self.path / "adapter" / "adapter_model.safetensors",
            self.path / "head.safetensors",
        )
        return " ".join(sha256_of(file)[:16] for file in files if file.is_file())


def adapter_scale(bundle: ClipBundle) -> float:
    """Returns the scale of a model's adapters; 1 as trained."""
    return injected_adapters(bundle.model)[0].scale


def method_labels(runs: Sequence[RunFolder]) -> dict[Path, str]:
    """Names the runs' methods; runs that differ in nothing but their seeds share a name.

    A name is the adapter's and, where runs of that adapter differ in an option, also its value:
    ``lora rank=8``.

    Returns:
        Names by the runs' folders.
    """
    flat = {
        run.path: flattened(run.config.to_plain())
        | {"scale": read_json(run.path / "adapter" / "adapter_config.json").get("scale", 1.0)}
        for run in runs
    }
    labels = {}
    for run in runs:
        name = run.config.adapter.name
        same = [flat[other.path] for other in runs if other.config.adapter.name == name]
        keys = dict.fromkeys(k for options in same for k in options if k not in _NOT_OF_THE_METHOD)
        differing = [key for key in keys if len({repr(options.get(key)) for options in same}) > 1]
        values = [f"{key.rpartition('.')[2]}={flat[run.path].get(key)}" for key in differing]
        labels[run.path] = " ".join([name, *values])
    return labels


def validation_set(data: DataConfig, seed: int) -> Dataset | None:
    """Returns the images that a run with these options validates with, as the split ``"val"``."""
    dataset = data.load()
    source = validation_source(dataset, data, seed)
    if source is None:
        return None
    return replace(dataset, splits={"val": source}, sizes={}, domains=())
