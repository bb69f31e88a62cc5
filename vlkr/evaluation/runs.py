from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vlkr.adapters import load_adapter
from vlkr.errors import VlkrError
from vlkr.models.clip import ClipBundle, load_clip


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
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        bundle = load_clip(config["model"], config["pretrained"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise VlkrError(f"{path} is not a run's configuration: {error}") from error
    load_adapter(bundle.model, run / "adapter")
    bundle.model.eval()
    return bundle, config
