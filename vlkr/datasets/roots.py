"""Where shards lie: in a folder, on a server, on the hub, or in what a command prints."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import quote, unquote

from huggingface_hub import get_token, hf_hub_url
from rich.markup import escape
from rich.progress import DownloadColumn, TaskID

from vlkr.datasets.cache import default_cache, sha256_of
from vlkr.datasets.remote import MissingError, download
from vlkr.errors import VlkrError
from vlkr.runtime import progress_bar

_LONG = 2**20
"""A download of so many bytes shows its progress."""


class Root(Protocol):
    """Files by their path below a root."""

    def open(self, path: str) -> BinaryIO:
        """Opens a file that can be sought in.

        Raises:
            MissingError: if there is none.
            VlkrError: if it cannot be read.
        """
        ...

    def where(self, path: str) -> str:
        """The whole address of a file, for messages."""
        ...

    def forget(self, path: str) -> None:
        """Drops a copy of a file that turned out to be damaged, so that it is fetched again."""
        ...


@dataclass(frozen=True)
class LocalRoot:
    """A folder."""

    folder: Path

    def open(self, path: str) -> BinaryIO:
        """Opens the file."""
        try:
            return (self.folder / path).open("rb", buffering=2**20)
        except FileNotFoundError as error:
            raise MissingError(f"no file {self.where(path)}") from error
        except OSError as error:
            raise VlkrError(f"cannot read {self.where(path)}: {error.strerror}") from error

    def where(self, path: str) -> str:
        """Its path."""
        return str(self.folder / path)

    def forget(self, path: str) -> None:
        """Does nothing, for there is no copy."""


@dataclass(frozen=True)
class RemoteRoot:
    """What a server holds, read through the cache.

    Attributes:
        pattern: the URL with ``{path}`` in place of the path.
        is_hub: the user's token for the Hugging Face hub is sent along.
    """

    pattern: str
    is_hub: bool = False

    def open(self, path: str) -> BinaryIO:
        """Opens the file in the cache, downloaded if it has to be."""
        url = self.where(path)

        def fetch(target: Path, on_size: Callable[[int], None]) -> str:
            token = get_token() if self.is_hub else None
            try:
                with _Shown(path, on_size) as shown:
                    begin, update = shown.begin, shown.update
                    return download(url, target, token=token, on_size=begin, on_done=update)
            except MissingError as error:
                # A layout goes without some of its texts, but a shard is counted and ought to be.
                raise MissingError(str(error), not path.endswith(".tar")) from error

        return default_cache().open(url, fetch)

    def where(self, path: str) -> str:
        """Its URL."""
        return self.pattern.replace("{path}", quote(path))

    def forget(self, path: str) -> None:
        """Removes the file from the cache."""
        default_cache().remove(self.where(path))


@dataclass(frozen=True)
class CommandRoot:
    """What a shell command prints, read through the cache.

    Attributes:
        pattern: the command with ``{path}`` in place of the path.
    """

    pattern: str

    def open(self, path: str) -> BinaryIO:
        """Opens what the command printed, run if it has to be."""
        command = self.pattern.replace("{path}", path)

        def fetch(target: Path, on_size: Callable[[int], None]) -> str:
            with target.open("w+b") as stream:
                done = subprocess.run(command, shell=True, stdout=stream, stderr=subprocess.PIPE)
                if done.returncode:
                    reason = done.stderr.decode(errors="replace").strip()[-200:]
                    raise MissingError(
                        f"command {command!r} ends with {done.returncode}: {reason}", False
                    )
                stream.seek(0)
                return sha256_of(stream)

        return default_cache().open(self.where(path), fetch)

    def where(self, path: str) -> str:
        """The address with ``pipe:``."""
        return "pipe:" + self.pattern.replace("{path}", path)

    def forget(self, path: str) -> None:
        """Removes the file from the cache."""
        default_cache().remove(self.where(path))


class _Shown:
    """Progress of a download that takes a while, on a terminal; workers are silent."""

    def __init__(self, path: str, on_size: Callable[[int], None]) -> None:
        self.path = path
        self.on_size = on_size
        self.progress = progress_bar(DownloadColumn())
        self.task: TaskID | None = None

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin(self, size: int) -> None:
        self.on_size(size)
        if size >= _LONG and self.task is None:
            self.task = self.progress.add_task(escape(self.path), total=size)
            self.progress.start()

    def update(self, done: int) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=done)


def is_address(reference: str) -> bool:
    """Whether a reference is to be read by :func:`open_root`, and is no path."""
    return reference.startswith(("wds/", "pipe:")) or "://" in reference


def open_root(reference: str, allow_commands: bool = False) -> Root:
    """The root that an address names.

    Args:
        reference: ``https://host/path``; ``hf://datasets/org/name[@revision][/path]``;
            ``wds/NAME``, CLIP_benchmark's name of one of its datasets on the hub; or
            ``pipe:COMMAND`` with ``{path}`` where the path of a file goes. ``HF_ENDPOINT`` names
            another hub.
        allow_commands: run commands.

    Raises:
        VlkrError: for another kind of address, or a command that is not allowed.
    """
    if reference.startswith("pipe:"):
        if not allow_commands:
            raise VlkrError(
                f"{reference!r} would run a command; --allow-commands (allow_commands=True) lets it"
            )
        if "{path}" not in reference:
            raise VlkrError(f"{reference!r} lacks {{path}}, the place of a file's path")
        return CommandRoot(reference[5:])
    if reference.startswith("wds/"):
        name = reference[4:].strip("/").replace("/", "-")
        reference = f"hf://datasets/clip-benchmark/wds_{name}"
    if reference.startswith("hf://"):
        return _hub_root(reference)
    if reference.startswith(("https://", "http://")):
        # A folder of the hub as a browser and CLIP_benchmark name it.
        url = re.sub(
            r"^(https://huggingface\.co/datasets/[^/]+/[^/]+)/tree/", r"\1/resolve/", reference
        )
        return RemoteRoot(url.rstrip("/") + "/{path}")
    scheme = reference.partition(":")[0]
    raise VlkrError(
        f"cannot read {reference}: {scheme}:// is not known, expected https://, hf:// or wds/; "
        "a command can read it, pipe:COMMAND with --allow-commands"
    )


def _hub_root(reference: str) -> Root:
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*?))?/?", reference)
    if not match:
        raise VlkrError(f"{reference!r} is no hf://datasets/ORG/NAME[@REVISION][/PATH]")
    repository, revision, folder = match.groups()
    url = hf_hub_url(
        repository,
        f"{folder}/x" if folder else "x",
        repo_type="dataset",
        revision=revision and unquote(revision),
        endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None,
    )
    return RemoteRoot(url[:-1] + "{path}", is_hub=True)
