"""Downloads and computed tensors on disk, within a size limit, for the next epoch and run."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout

from vlkr.errors import VlkrError
from vlkr.files import json_sha256, read_json, sha256_of, write_json

if TYPE_CHECKING:
    from torch import Tensor

Fetch = Callable[[Path, Callable[[int], None]], str]
"""Writes a file to a path, calls the function with its size once that is known, and returns its
SHA-256."""

_BELIEVED_SECONDS = 24 * 3600
# Files whose checksum this process has verified, by path, size and modification time.
_verified: set[tuple[Path, int, int]] = set()


class MissingError(VlkrError):
    """There is no such file.

    Attributes:
        is_lasting: it will hardly be there tomorrow.
    """

    def __init__(self, message: str, is_lasting: bool = True) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting


def default_cache() -> Cache:
    """The cache in ``$VLKR_CACHE`` (``~/.cache/vlkr``) of ``$VLKR_CACHE_GB`` (50) gigabytes."""
    size = os.environ.get("VLKR_CACHE_GB", "50")
    try:
        max_bytes = int(float(size) * 1e9)
    except (ValueError, OverflowError):
        max_bytes = 0
    if max_bytes <= 0:
        raise VlkrError(f"VLKR_CACHE_GB is {size!r}, expected a number of gigabytes above 0")
    folder = os.environ.get("VLKR_CACHE") or "~/.cache/vlkr"
    return Cache(Path(folder).expanduser(), max_bytes)


def cached_tensors(
    kind: str, key: Mapping[str, Any], make: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and texts from the default cache, or computes and keeps them.

    A cache that cannot be written is a warning.

    Args:
        kind: of tensors.
        key: all that the tensors depend on; JSON.
        make: computes tensors by name, and texts by name.
    """
    import safetensors.torch  # which imports torch

    address = f"{kind}/{json_sha256(key)}"

    def refuse(target: Path, on_size: Callable[[int], None]) -> str:
        raise MissingError("not computed yet", is_lasting=False)

    def write(target: Path, on_size: Callable[[int], None]) -> str:
        safetensors.torch.save_file(tensors, target, metadata=texts)
        return sha256_of(target)

    with suppress(VlkrError), default_cache().open(address, refuse) as stream:
        content = stream.read()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return safetensors.torch.load(content), header.get("__metadata__", {})
    tensors, texts = make()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        default_cache().open(address, write).close()
    except (VlkrError, safetensors.SafetensorError) as error:
        warnings.warn(f"nothing is cached: {error}; --no-cache turns it off", stacklevel=2)
    return tensors, texts


@dataclass(frozen=True)
class Cache:
    """A folder of files by address, shared by processes, of bounded size.

    A JSON sidecar of each file has its address, size and SHA-256; a file that does not match is
    fetched again. A file that was fetched once is not asked for again; that one is missing is
    believed for a day. The least recently used files are removed to make room for new ones.

    Attributes:
        folder: made when it is needed.
        max_bytes: of the files together. What other processes are just fetching can exceed it.
    """

    folder: Path
    max_bytes: int

    def open(self, address: str, fetch: Fetch) -> BinaryIO:
        """Opens the file at ``address``; of several processes that lack it, one fetches it.

        Raises:
            MissingError: if there is no such file.
            VlkrError: if it cannot be fetched, or does not fit into the cache.
        """
        entry = self._entry(address)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.path("lock")):
                if not entry.is_whole():
                    self._fetch(address, entry, fetch)
                now = time.time_ns()  # finer than the system's own stamp
                os.utime(entry.path("json"), ns=(now, now))
                return entry.path("data").open("rb", buffering=2**20)
        except OSError as error:
            raise VlkrError(f"cannot use the cache {self.folder}: {error.strerror}") from error

    def remove(self, address: str) -> None:
        """Removes the file of ``address``, if it is there and the cache can be written."""
        entry = self._entry(address)
        with suppress(OSError), FileLock(entry.path("lock")):
            entry.remove()

    def _entry(self, address: str) -> _Entry:
        return _Entry(self.folder / hashlib.sha256(address.encode()).hexdigest()[:32])

    def _fetch(self, address: str, entry: _Entry, fetch: Fetch) -> None:
        entry.remove()
        part, data, sidecar = map(entry.path, ("part", "data", "json"))
        try:
            sha256 = fetch(part, lambda size: self._make_room(size, entry))
            size = part.stat().st_size
            self._make_room(size, entry)
            part.replace(data)
            write_json(sidecar, {"address": address, "size": size, "sha256": sha256})
            _verified.add(entry.state())
        except MissingError as error:
            if error.is_lasting:
                write_json(sidecar, {"address": address, "missing": str(error)})
            raise
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int, own: _Entry) -> None:
        if size > self.max_bytes:
            raise VlkrError(
                f"a file of {size:,} bytes does not fit into the cache {self.folder} of "
                f"{self.max_bytes:,}; VLKR_CACHE_GB sets its size"
            )
        others = {_Entry(path.with_suffix("")) for path in self.folder.glob("*.*")} - {own}
        excess = sum(entry.size() for entry in others) + size - self.max_bytes
        for entry in sorted(others, key=_Entry.last_used):
            if excess <= 0:
                return
            with suppress(Timeout), FileLock(entry.path("lock"), timeout=0):
                excess -= entry.size()
                entry.remove()


@dataclass(frozen=True)
class _Entry:
    """The files that belong to an address: ``.data``, its ``.json``, ``.part`` and ``.lock``."""

    stem: Path

    def path(self, suffix: str) -> Path:
        return self.stem.with_suffix(f".{suffix}")

    def size(self) -> int:
        return sum(_stat(self.path(suffix))[0] for suffix in ("data", "part"))

    def last_used(self) -> int:
        """The sidecar's time in ns; 0 for what a killed process has left."""
        return _stat(self.path("json"))[1]

    def state(self) -> tuple[Path, int, int]:
        return self.path("data"), *_stat(self.path("data"))

    def remove(self) -> None:
        for suffix in ("json", "data", "part"):
            self.path(suffix).unlink(missing_ok=True)

    def is_whole(self) -> bool:
        """Whether the data is there and as it was fetched.

        Raises:
            MissingError: if there was no such file less than a day ago.
        """
        try:
            facts = read_json(self.path("json"))
            if "missing" in facts and time.time() - self.last_used() / 1e9 < _BELIEVED_SECONDS:
                raise MissingError(facts["missing"])
            state = self.state()
            if state not in _verified and sha256_of(self.path("data")) != facts["sha256"]:
                return False
            _verified.add(state)
        except MissingError:
            raise
        except (OSError, VlkrError, KeyError):
            return False
        return True


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
