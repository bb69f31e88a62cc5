"""Files that are never half-written, and the resources that travel in the package."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vlkr.errors import VlkrError

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Path of a folder or file that ships: ``configs/...``, ``data/...`` or ``models/...``.

    An installed wheel carries ``configs`` and ``data`` inside the package; a checkout has them
    beside it.
    """
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / name


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``target``; renames it to ``target`` when the block succeeds.

    Raises:
        VlkrError: if the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise VlkrError(f"cannot write {target}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise VlkrError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside ``target``, which gets that name when the block succeeds.

    Args:
        target: the folder to write. An empty one is replaced.
        force: replace a folder that holds something. The old one stays whole until the new one is.

    Raises:
        VlkrError: if ``target`` exists and ``force`` is false, or cannot be written.
    """
    check_free(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise VlkrError(f"cannot write {target}: {error.strerror}") from error
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # as open for others as a plain file
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(old)
            try:
                temporary.replace(target)
            except BaseException:
                old.replace(target)
                raise
            shutil.rmtree(old)
        else:
            temporary.replace(target)
    except OSError as error:
        raise VlkrError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: Path, *, force: bool = False, hint: str = "--force replaces it") -> None:
    """Raises :class:`VlkrError` unless ``target`` is a folder that is empty or can be made."""
    try:
        nearest = next(path for path in (target, *target.absolute().parents) if path.exists())
        if nearest == target and not target.is_dir():
            raise VlkrError(f"{target} is a file, expected a folder to write")
        if nearest == target and not force and any(target.iterdir()):
            raise VlkrError(f"{target} exists already; name another folder, or {hint}")
    except OSError as error:
        raise VlkrError(f"cannot write {target}: {error.strerror}") from error
    if not nearest.is_dir():
        raise VlkrError(f"cannot write {target}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise VlkrError(f"cannot write {target}: no permission to write in {nearest}")


def write_text(target: Path, text: str) -> None:
    """Writes ``text`` to ``target`` in one step."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON to ``target`` in one step."""
    write_text(target, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        VlkrError: if the file is missing, or is no JSON object.
    """
    return _read(path, json.loads, "JSON")


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        VlkrError: if the file is missing, or is no YAML mapping.
    """
    return _read(path, yaml.safe_load, "YAML")


def _read(path: Path, parse: Callable[[str], Any], kind: str) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VlkrError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).replace('in "<unicode string>", ', "at ")
        raise VlkrError(f"{path} is not valid {kind}: {reason}") from error
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise VlkrError(f"{path} holds {found}, expected a mapping of names to values in {kind}")
    return value
