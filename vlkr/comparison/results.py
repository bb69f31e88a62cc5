"""The files of a cell's folder, and whether they are those of a plan's cell."""

from __future__ import annotations

from pathlib import Path

from vlkr.comparison.plan import Cell
from vlkr.errors import VlkrError
from vlkr.files import differences, read_json, write_json

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
    changed = "; ".join(sorted(differences(before, cell.to_json()).values()))
    raise VlkrError(
        f"{folder} holds a result of another configuration ({changed}); name another "
        "folder, or --force computes such cells again"
    )


def write_error(folder: Path, kind: str, message: str, details: str = "") -> None:
    """Records that a cell failed."""
    write_json(folder / ERROR, {"type": kind, "message": message, "traceback": details})
