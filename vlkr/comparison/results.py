"""The files of a cell's folder, and whether they are those of a plan's cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkr.comparison.plan import Cell
from vlkr.errors import VlkrError
from vlkr.files import read_json, write_json

RESULT, ERROR, CONFIG, PREDICTIONS = (
    "result.json",
    "error.json",
    "cell.json",
    "predictions.safetensors",
)


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether the folder holds this cell's result.

    Raises:
        VlkrError: if it holds that of another configuration.
    """
    if not (folder / RESULT).is_file():
        return False
    found = read_json(folder / RESULT)
    if found.get("hash") == cell.hash:
        return True
    before = read_json(folder / CONFIG)["cell"]
    changed = _differences(before, cell.to_json())
    raise VlkrError(
        f"{folder} holds a result of another configuration ({'; '.join(changed)}); name another "
        "folder, or --force computes such cells again"
    )


def write_error(folder: Path, kind: str, message: str, details: str = "") -> None:
    """Records that a cell failed."""
    write_json(folder / ERROR, {"type": kind, "message": message, "traceback": details})


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What has changed, in words.

    >>> _differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    ['a.c is 3 now and was 2']
    """
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {new} now and was {old}")
    return found
