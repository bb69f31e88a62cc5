"""Files of a dataset in a folder, on a server, on the hub, or as the output of a command.

Downloads are resumed and verified: an epoch completes or raises. fsspec and huggingface_hub take an
answer that ends early for the whole file where the server states no length.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import re
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import quote, unquote, urlsplit

from huggingface_hub import get_token, hf_hub_url
from rich.markup import escape
from rich.progress import DownloadColumn

from vlkr.caching import MissingError, default_cache
from vlkr.errors import VlkrError
from vlkr.runtime import progress_bar
from vlkr.version import __version__

_MIB = 2**20
_RETRIED = (408, 425, 429, 500, 502, 503, 504)

OnBytes = Callable[[int], None]


class Root(Protocol):
    """Files by their path below a root."""

    def open(self, path: str) -> BinaryIO:
        """Opens a file that can be sought in; :class:`MissingError` if there is none."""
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
            return (self.folder / path).open("rb", buffering=_MIB)
        except FileNotFoundError as error:
            raise MissingError(f"no file {self.where(path)}") from error
        except OSError as error:
            raise VlkrError(f"cannot read {self.where(path)}: {error.strerror}") from error

    def where(self, path: str) -> str:
        """Its path."""
        return str(self.folder / path)

    def forget(self, path: str) -> None:
        """Does nothing, for there is no copy."""


class _CachedRoot(ABC):
    """A root whose files are read through the cache."""

    @abstractmethod
    def where(self, path: str) -> str: ...

    @abstractmethod
    def _fetch(self, path: str, target: Path, on_size: OnBytes) -> str: ...

    def open(self, path: str) -> BinaryIO:
        """Opens the file in the cache, fetched if it has to be."""
        return default_cache().open(self.where(path), partial(self._fetch, path))

    def forget(self, path: str) -> None:
        """Removes the file from the cache."""
        default_cache().remove(self.where(path))


@dataclass(frozen=True)
class RemoteRoot(_CachedRoot):
    """Files on a server.

    Attributes:
        pattern: the URL with ``{path}`` in place of the path.
        is_hub: the user's token for the Hugging Face hub is sent along.
    """

    pattern: str
    is_hub: bool = False

    def where(self, path: str) -> str:
        """Its URL."""
        return self.pattern.replace("{path}", quote(path))

    def _fetch(self, path: str, target: Path, on_size: OnBytes) -> str:
        progress = progress_bar(DownloadColumn())
        task = progress.add_task(escape(path))

        def begin(size: int) -> None:
            on_size(size)
            progress.update(task, total=size)
            if size >= _MIB:
                progress.start()

        token = get_token() if self.is_hub else None
        try:
            return download(
                self.where(path),
                target,
                token=token,
                on_size=begin,
                on_done=lambda done: progress.update(task, completed=done),
            )
        except MissingError as error:  # which may last for a text, but not for a counted shard
            raise MissingError(str(error), not path.endswith(".tar")) from error
        finally:
            progress.stop()


@dataclass(frozen=True)
class CommandRoot(_CachedRoot):
    """The output of a shell command.

    Attributes:
        pattern: the command with ``{path}`` in place of the path.
    """

    pattern: str

    def where(self, path: str) -> str:
        """The address with ``pipe:``."""
        return "pipe:" + self.pattern.replace("{path}", path)

    def _fetch(self, path: str, target: Path, on_size: OnBytes) -> str:
        command = self.pattern.replace("{path}", path)
        with target.open("w+b") as stream:
            done = subprocess.run(command, shell=True, stdout=stream, stderr=subprocess.PIPE)
            if done.returncode:
                reason = f"{done.returncode}: {done.stderr.decode(errors='replace').strip()[-200:]}"
                raise MissingError(f"command {command!r} ends with {reason}", False)
            stream.seek(0)
            return hashlib.file_digest(stream, "sha256").hexdigest()


def is_address(reference: str) -> bool:
    """Whether a reference is to be read by :func:`open_root`, and is not a path."""
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
        VlkrError: for an unknown kind of address, or a command that is not allowed.
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
        pattern = r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*?))?/?"
        match = re.fullmatch(pattern, reference)
        if not match:
            raise VlkrError(f"{reference!r} is not hf://datasets/ORG/NAME[@REVISION][/PATH]")
        repository, revision, folder = match.groups()
        url = hf_hub_url(
            repository,
            f"{folder}/x" if folder else "x",
            repo_type="dataset",
            revision=revision and unquote(revision),
            endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None,
        )
        return RemoteRoot(url[:-1] + "{path}", is_hub=True)
    if reference.startswith(("https://", "http://")):
        # A folder of the hub as a browser and CLIP_benchmark name it.
        pattern = r"^(https://huggingface\.co/datasets/[^/]+/[^/]+)/tree/"
        return RemoteRoot(re.sub(pattern, r"\1/resolve/", reference).rstrip("/") + "/{path}")
    scheme = reference.partition(":")[0]
    raise VlkrError(
        f"cannot read {reference}: {scheme}:// is not known, expected https://, hf:// or wds/; "
        "a command can read it, pipe:COMMAND with --allow-commands"
    )


@dataclass(frozen=True)
class Retry:
    """How often and how long to try.

    Attributes:
        attempts: consecutive requests that bring nothing new before it is an error.
        backoff: seconds before the second; doubled each time, with up to half as much at random.
        timeout: seconds without a byte after which a connection counts as dropped.
    """

    attempts: int = 6
    backoff: float = 1.0
    timeout: float = 30.0


RETRY = Retry()


def download(
    url: str,
    target: Path,
    *,
    token: str | None = None,
    retry: Retry | None = None,
    on_size: OnBytes = lambda size: None,
    on_done: OnBytes = lambda done: None,
) -> str:
    """Writes the whole content of a URL to a file.

    A dropped, stalled or short answer and the statuses 408, 425, 429 and 5xx are retried with
    exponential backoff, from where the last answer ended if the server allows it. Redirects are
    followed, but never from https to http; the token goes to the first host alone.

    Args:
        url: http or https.
        target: file to write.
        token: sent as bearer.
        retry: ``RETRY`` by default.
        on_size: called with the number of bytes as soon as the server states it.
        on_done: called with the number of bytes that are written, again and again.

    Returns:
        SHA-256 of what was written.

    Raises:
        MissingError: for the statuses 404 and 410.
        VlkrError: for another status, or after the last attempt.
    """
    retry = retry or RETRY
    transfer = _Transfer(url, target, token, retry.timeout, on_size, on_done)
    failures = 0
    while True:
        furthest, wait = transfer.furthest, 0.0
        try:
            return transfer.run()
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            seconds = error.headers.get("Retry-After", "") if error.headers else ""
            wait = min(float(seconds), 60.0) if seconds.isdecimal() else 0.0
            error.close()
            if error.code in (404, 410):
                raise MissingError(f"nothing at {url}: {reason}") from error
            if error.code == 416:  # the file has become shorter
                transfer.restart()
            elif error.code not in _RETRIED:
                hint = "; is a token needed (hf auth login)?" if error.code in (401, 403) else ""
                raise VlkrError(f"cannot read {url}: {reason}{hint}") from error
        except (OSError, http.client.HTTPException, _BadAnswerError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = str(cause) or type(cause).__name__
            unknown_host = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
            if unknown_host or isinstance(cause, ssl.SSLCertVerificationError):
                raise VlkrError(f"cannot read {url}: {reason}") from error
        failures = 1 if transfer.furthest > furthest else failures + 1
        if failures >= retry.attempts:
            raise VlkrError(f"cannot read {url}, giving up after {failures} attempts: {reason}")
        time.sleep(max(wait, retry.backoff * 2 ** (failures - 1) * random.uniform(1, 1.5)))


class _BadAnswerError(Exception):
    """An answer that is worth another try."""


@dataclass
class _Transfer:
    """The part of a file that has arrived so far, over several requests."""

    url: str
    target: Path
    token: str | None
    timeout: float
    on_size: OnBytes
    on_done: OnBytes

    def __post_init__(self) -> None:
        self.url = quote(self.url, safe="%/:=&?~#+!$,;'@()*[]")
        self.redirect = _Redirect()
        self.opener = urllib.request.build_opener(self.redirect)
        self.furthest = 0
        self.restart()

    def restart(self) -> None:
        self.done = 0
        self.digest = hashlib.sha256()
        self.version: str | None = None

    def run(self) -> str:
        """One request; raises unless the file is whole after it."""
        request = urllib.request.Request(self.url, headers={"User-Agent": f"vlkr/{__version__}"})
        request.add_header("Accept-Encoding", "identity")
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        if self.done and self.version:
            request.add_header("Range", f"bytes={self.done}-")
            request.add_header("If-Range", self.version)
        with self.opener.open(request, timeout=self.timeout) as response:
            total = self._begin(response)
            if total is not None:
                self.on_size(total)
            with self.target.open("r+b" if self.done else "wb", buffering=0) as stream:
                self._copy(response, stream)
        if total is not None and self.done != total:
            raise _BadAnswerError(f"{self.done:,} of {total:,} bytes came")
        sha256 = self.digest.hexdigest()
        expected = self.redirect.sha256 or sha256
        if sha256 != expected:
            self.restart()
            raise _BadAnswerError(f"SHA-256 {sha256[:12]}, the server states {expected[:12]}")
        return sha256

    def _begin(self, response: Any) -> int | None:
        """The size of the file; None where the chunks of the answer tell its end."""
        if response.status == 206:
            span = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != self.done:
                self.restart()
                raise _BadAnswerError("the server answers with a part that was not asked for")
            return int(span[2])
        self.restart()
        tag = response.headers.get("ETag", "")
        weak = not tag or tag.startswith("W/")
        self.version = response.headers.get("Last-Modified") if weak else tag
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal() and not response.chunked:
            raise _BadAnswerError("the server does not state the length of its answer")
        return None if response.chunked else int(length)

    def _copy(self, response: Any, stream: RawIOBase) -> None:
        stream.seek(self.done)
        while block := response.read1(_MIB):
            try:
                stream.write(block)
            except OSError as error:
                raise VlkrError(f"cannot write {self.target}: {error.strerror}") from error
            self.digest.update(block)
            self.done += len(block)
            self.furthest = max(self.furthest, self.done)
            self.on_done(self.done)


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Stays on https, and keeps the SHA-256 that the hub states before it redirects."""

    sha256: str | None = None

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("https", req.type):
            raise VlkrError(f"{req.full_url} redirects to {newurl}, which is not {req.type}")
        linked = headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", linked):
            self.sha256 = linked
        return super().redirect_request(req, fp, code, msg, headers, newurl)
