from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkr.adapters import load_adapter
from vlkr.datasets import Dataset, load_dataset
from vlkr.errors import VlkrError
from vlkr.files import read_yaml
from vlkr.models.clip import ClipBundle, load_clip

_NEEDED = {
    "": ("model", "pretrained", "seed"),
    "adapter": ("name", "options"),
    "data": ("name", "root", "shots", "templates", "test_fraction"),
}


def load_run(run: Path) -> tuple[ClipBundle, dict[str, Any]]:
    """Loads the adapted model of a run folder.

    Args:
        run: written by ``vlkr adapt``.

    Returns:
        The model with its adapters, and the run's configuration.

    Raises:
        VlkrError: if the folder is not a finished run, or its base model has changed.
    """
    if not run.is_dir():
        raise VlkrError(f"no run folder at {run}")
    path = run / "config.yaml"
    if not path.is_file() or not (run / "adapter").is_dir():
        raise VlkrError(f"{run} is not a finished run: expected config.yaml and adapter/ in it")
    config = read_yaml(path)
    for section, keys in _NEEDED.items():
        for key in keys:
            part = config.get(section, {}) if section else config
            if not isinstance(part, dict) or key not in part:
                name = f"{section}.{key}".lstrip(".")
                raise VlkrError(f"{path} is not a run's configuration: it lacks {name}")
    bundle = load_clip(config["model"], config["pretrained"])
    load_adapter(bundle.model, run / "adapter")
    bundle.model.eval()
    return bundle, config


def run_dataset(config: dict[str, Any]) -> Dataset:
    """The home dataset of a run, with its prompts and its split.

    Raises:
        VlkrError: if the dataset is not there any more.
    """
    data = config["data"]
    templates = data["templates"]
    return load_dataset(
        data["root"] or data["name"],
        templates=None if templates is None else tuple(templates),
        test_fraction=data["test_fraction"],
    )
