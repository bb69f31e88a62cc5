"""Names of models, resolved without importing their libraries."""

from __future__ import annotations

from pathlib import Path

from vlkr.files import resource

TINY = "tiny"


def is_timm(name: str) -> bool:
    """Returns whether a name is that of a timm image encoder, ``timm:NAME``."""
    return name.startswith("timm:")


def absolute_names(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """Returns the names of the same model and weights with absolute paths."""
    source = model_source(name)
    folder = name.partition("timm:local-dir:")[2]
    if folder:
        name = f"timm:local-dir:{Path(folder).resolve()}"
    elif name != TINY and source.startswith("local-dir:"):
        name = f"local-dir:{Path(source.removeprefix('local-dir:')).resolve()}"
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).resolve())
    return name, pretrained


def model_source(name: str) -> str:
    """Returns the name as open_clip takes it."""
    if name == TINY:
        return f"local-dir:{resource('models/tiny_clip')}"
    if name.startswith("local-dir:"):
        return name
    if (Path(name) / "open_clip_config.json").is_file():
        return f"local-dir:{name}"
    return name if name.startswith("hf-hub:") else name.replace("/", "-")
