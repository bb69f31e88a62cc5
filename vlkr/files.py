"""Files that are never half-written, their hashes, nested options, and bundled resources."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from vlkr.errors import VlkrError

_PACKAGE = Path(__file__).resolve().parent
_HOST = re.sub(r"\W", "_", socket.gethostname())
_OLD, _LOCK = "old.", ".lock"
_MAX_BYTES = {"JSON": 2**26, "YAML": 2**20}  # of YAML a MiB takes 10 s
_MAX_NODES = 10**6
# PyYAML's constructors stumble over what their tags do not fit.
_PARSE_ERRORS = (
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    yaml.YAMLError,
)


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
        _sweep(target)
        handle, name = tempfile.mkstemp(prefix=_prefix(target), dir=target.parent)
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
    try:
        if target.parent.is_dir():
            _sweep(target)
        check_free(target, force=force)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    except OSError as error:
        raise VlkrError(f"cannot write {target}: {error.strerror}") from error
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # as open for others as a plain file
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=_prefix(target, _OLD), dir=target.parent))
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


def _prefix(target: Path, kind: str = "") -> str:
    """Of what is written beside ``target``: tells which process of which machine writes it."""
    return f".{target.name}.{kind}{_HOST}-{os.getpid()}."


def _sweep(target: Path) -> None:
    """Removes what processes that were killed left beside ``target``.

    A folder that was about to be replaced gets its name back.
    """
    named = re.compile(rf"\.{re.escape(target.name)}\.({_OLD})?{re.escape(_HOST)}-(\d+)\.\w+")
    for name in os.listdir(target.parent):  # noqa: PTH208 (of the folders, most hold nothing)
        match = named.fullmatch(name)
        if match is None or _is_alive(int(match[2])):
            continue
        path = target.parent / name
        if match[1] and not target.exists() and any(path.iterdir()):
            path.replace(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; the system drops the lock of one that dies.

    A folder that is made here and stays empty is removed again.

    Raises:
        VlkrError: if another process is at work there, or the folder cannot be written.
    """
    lock = FileLock(folder / _LOCK, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise VlkrError(
            f"{folder} is in use by another process; wait for it, or name another folder"
        ) from error
    except OSError as error:
        raise VlkrError(f"cannot write {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def check_free(target: Path, *, force: bool = False, hint: str = "--force replaces it") -> None:
    """Raises :class:`VlkrError` unless ``target`` is a folder that is empty or can be made."""
    try:
        nearest = next(path for path in (target, *target.absolute().parents) if path.exists())
        if nearest == target and not target.is_dir():
            raise VlkrError(f"{target} is a file, expected a folder to write")
        if nearest == target and not force and any(p.name != _LOCK for p in target.iterdir()):
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
    return _read(path, _parse_yaml, "YAML")


def _read(path: Path, parse: Callable[[str], Any], kind: str) -> dict[str, Any]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise VlkrError(f"cannot read {path}: it is not a file")
        if status.st_size > (most := _MAX_BYTES[kind]):
            raise VlkrError(
                f"cannot read {path}: it has {status.st_size:,} bytes, more than the {most:,} "
                f"allowed for {kind}"
            )
        value = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VlkrError(f"cannot read {path}: {error.strerror}") from error
    except VlkrError:
        raise
    except RecursionError as error:
        raise VlkrError(f"{path} is not valid {kind}: it is nested too deeply") from error
    except _PARSE_ERRORS as error:
        reason = str(error).replace('in "<unicode string>", ', "at ")
        raise VlkrError(f"{path} is not valid {kind}: {reason}") from error
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise VlkrError(f"{path} holds {found}, expected a mapping of names to values in {kind}")
    return value


def _parse_yaml(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """Nodes below one, each as often as it is referred to: few lines of aliases make billions.

    Raises:
        ValueError: for more than a million, or a node that holds itself.
    """
    if id(node) not in counted:
        counted[id(node)] = _MAX_NODES  # until it is known: a cycle comes back here
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        counted[id(node)] = 1 + sum(_count_nodes(c, counted) for pair in pairs for c in pair)
    if counted[id(node)] >= _MAX_NODES:
        raise ValueError(f"its aliases make more than {_MAX_NODES:,} values")
    return counted[id(node)]


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Returns the SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flattened(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested options by their dotted names.

    >>> flattened({"adapter": {"name": "lora", "options": {"rank": 8}}, "seed": 1})
    {'adapter.name': 'lora', 'adapter.options.rank': 8, 'seed': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in options.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Describes what has changed, by dotted name.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    {'a.c': 'a.c is 3 now and was 2'}
    """
    old, new = flattened(before), flattened(now)
    return {
        key: f"{key} is {new.get(key)} now and was {old.get(key)}"
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key)
    }
