from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from vlkr.adapters import load_adapter, save_adapter, set_adapter_scale
from vlkr.adapters.inject import injected_adapters
from vlkr.datasets import DataOptions, Dataset, load_dataset
from vlkr.datasets.samples import View
from vlkr.datasets.transforms import to_tensor
from vlkr.errors import VlkrError
from vlkr.files import flattened, read_json, read_yaml, write_text
from vlkr.models.classifier import ClassHead
from vlkr.models.clip import ClipBundle
from vlkr.models.loading import load_model

_NEEDED = {
    "": ("model", "pretrained", "seed"),
    "adapter": ("name", "options"),
    "data": ("name", "root", "shots", "templates", "test_fraction"),
}
# Options that say how a run is computed, and not what it learns.
NEUTRAL = {
    "data.num_workers",
    "data.memory_gb",
    "data.max_bad",
    "trainer.accelerator",
    "trainer.progress",
}
# Those, and others in which runs of one method may differ.
_NO_METHOD = {*NEUTRAL, "seed", "data.name", "data.root", "data.allow_commands"}


def load_run(run: Path) -> tuple[ClipBundle, dict[str, Any]]:
    """Loads the adapted model of a run folder.

    Args:
        run: written by ``vlkr adapt``.

    Returns:
        The model with its adapters, and the run's configuration.

    Raises:
        VlkrError: if the folder is not a finished run, or its base model has changed.
    """
    config = run_config(run)
    bundle = load_model(config["model"], config["pretrained"])
    if not bundle.has_text:
        bundle.head = ClassHead.load(run / "head.safetensors")
    load_adapter(bundle.model, run / "adapter")
    bundle.model.eval()
    return bundle, config


def save_scaled_run(bundle: ClipBundle, config: dict[str, Any], scale: float, output: Path) -> None:
    """Makes ``output`` a run folder with a run's configuration and its adapter, scaled.

    Args:
        bundle: of :func:`load_run`; its adapter keeps the factor.
        config: likewise.
        scale: the adapter's factor.
        output: folder for ``config.yaml`` and ``adapter/``, which are replaced; what a run that
            was there measured is removed.
    """
    (output / "metrics.json").unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    bundle.model.to("cpu")
    set_adapter_scale(bundle.model, scale)
    save_adapter(bundle.model, output / "adapter", base_model=bundle.label, force=True)
    if bundle.head is not None:
        bundle.head.save(output / "head.safetensors")
    write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def run_config(run: Path) -> dict[str, Any]:
    """The configuration of a finished run.

    Raises:
        VlkrError: if the folder is not one.
    """
    if not run.is_dir():
        raise VlkrError(f"no run folder at {run}")
    path = run / "config.yaml"
    if not path.is_file() or not (run / "adapter").is_dir():
        hint = "; `vlkr adapt --resume` goes on with it" if (run / "checkpoints").is_dir() else ""
        raise VlkrError(
            f"{run} is not a finished run: expected config.yaml and adapter/ in it{hint}"
        )
    config = read_yaml(path)
    for section, keys in _NEEDED.items():
        for key in keys:
            part = config.get(section, {}) if section else config
            if not isinstance(part, dict) or key not in part:
                name = f"{section}.{key}".lstrip(".")
                raise VlkrError(f"{path} is not a run's configuration: it lacks {name}")
    return config


def run_context(bundle: ClipBundle, config: dict[str, Any]) -> dict[str, Any]:
    """What a run's numbers depend on beside the model, for captions."""
    scale = adapter_scale(bundle)
    return {
        "adapter": config["adapter"]["name"],
        "options": config["adapter"]["options"],
        "adapter scale": None if scale == 1 else scale,
        **run_options(config).context(),
        "seed": config["seed"],
        "checkpoint": "last iteration",
    }


def adapter_scale(bundle: ClipBundle) -> float:
    """The factor of a model's adapters, 1 as they are trained."""
    return injected_adapters(bundle.model)[0].scale


def run_labels(runs: Mapping[Path, dict[str, Any]]) -> dict[Path, str]:
    """Names of runs' methods, the same for those that differ in nothing but their seeds.

    A name is the adapter's and, where runs of that adapter differ in an option, also its value:
    ``lora rank=8``.

    Args:
        runs: configurations by folder.
    """
    flat = {
        folder: flattened(config)
        | {"scale": read_json(folder / "adapter" / "adapter_config.json").get("scale", 1.0)}
        for folder, config in runs.items()
    }
    labels = {}
    for folder, config in runs.items():
        name = config["adapter"]["name"]
        kin = [flat[f] for f, c in runs.items() if c["adapter"]["name"] == name]
        keys = dict.fromkeys(key for options in kin for key in options if key not in _NO_METHOD)
        differing = [key for key in keys if len({repr(options.get(key)) for options in kin}) > 1]
        values = [f"{key.rpartition('.')[2]}={flat[folder].get(key)}" for key in differing]
        labels[folder] = " ".join([name, *values])
    return labels


def run_options(config: dict[str, Any]) -> DataOptions:
    """The data of a run, as it was told to ``vlkr adapt``.

    Raises:
        VlkrError: if a value is of another type.
    """
    return DataOptions.read(config["data"])


def run_dataset(config: dict[str, Any]) -> Dataset:
    """The home dataset of a run, with its prompts and its split.

    Raises:
        VlkrError: if the dataset is not there any more.
    """
    return run_options(config).load()


def home_and_shifts(
    home: Dataset | None,
    names: Sequence[str],
    shifts: bool,
    templates: Sequence[str] | None,
    test_fraction: float,
) -> list[Dataset]:
    """Datasets to measure on, the home dataset first.

    Args:
        home: the first; None takes the first of ``names``.
        names: cards' names or folders.
        shifts: add those that the home dataset's card names.
        templates: for all of them, None for each dataset's own.
        test_fraction: of folders without splits.
    """
    loaded = [] if home is None else [home]
    loaded += [load_dataset(name, test_fraction=test_fraction) for name in names]
    if shifts:
        known = {dataset.name for dataset in loaded}
        others = [name for name in loaded[0].shifts if name not in known]
        loaded += [load_dataset(name, test_fraction=test_fraction) for name in others]
    return [dataset.with_templates(templates) for dataset in loaded]


def run_validation(config: dict[str, Any], templates: Sequence[str] | None) -> Dataset | None:
    """The images that a run validated with, as the split ``"val"`` of its dataset.

    Args:
        config: of the run.
        templates: in place of the run's.

    Returns:
        None if there are none, for the classes have no more images than were trained on.
    """
    from vlkr.datasets import FewShotDataModule  # imports Lightning, which takes seconds

    dataset, options = run_dataset(config), run_options(config)
    # Only which images were drawn is asked for, so the transforms are never called.
    data = FewShotDataModule(dataset, options, config["seed"], to_tensor, to_tensor)
    source = data.val_source
    if source is None and data.val_images:
        has_own = "val" in dataset.splits and data.pool is dataset.source("train")
        pool = dataset.source("val") if has_own else data.pool
        source = View(pool, times=Counter(data.val_images.keys))
    if source is None:
        return None
    validation = replace(dataset, splits={"val": source}, sizes={}, domains=())
    return validation.with_templates(templates)
