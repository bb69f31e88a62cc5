"""Reading over HTTP from servers that drop, stall, truncate and lie."""

from __future__ import annotations

import hashlib
import http.client
import random
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from io import RawIOBase
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from vlkr.errors import VlkrError
from vlkr.version import __version__

_BLOCK = 2**20
_LATER = (408, 425, 429, 500, 502, 503, 504)


class MissingError(VlkrError):
    """There is no such file.

    Attributes:
        is_lasting: it will hardly be there tomorrow.
    """

    def __init__(self, message: str, is_lasting: bool = True) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting


@dataclass(frozen=True)
class Retry:
    """How long to bear with a server.

    Attributes:
        attempts: requests in a row that bring nothing new before it is an error.
        backoff: seconds before the second; doubled each time, with up to half as much by chance.
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
    on_size: Callable[[int], None] = lambda size: None,
    on_done: Callable[[int], None] = lambda done: None,
) -> str:
    """Writes what is at ``url`` to ``target``, all of it.

    A dropped, stalled or short answer and the statuses 408, 425, 429 and 5xx are retried with
    exponential backoff, from where the last answer ended if the server allows it. Redirects are
    followed, but never from https to http; the token goes to the first host alone.

    Args:
        url: http or https.
        target: file to write.
        token: sent as bearer.
        retry: attempts, backoff and timeout; ``RETRY`` by default.
        on_size: called with the number of bytes as soon as the server tells it.
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
        furthest = transfer.furthest
        wait = 0.0
        try:
            return transfer.run()
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            wait = _retry_after(error.headers)
            error.close()
            if error.code in (404, 410):
                raise MissingError(f"nothing at {url}: {reason}") from error
            if error.code == 416:  # what is there has become shorter
                transfer.restart()
            elif error.code not in _LATER:
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
            raise VlkrError(f"cannot read {url}, after {failures} attempts in vain: {reason}")
        time.sleep(max(wait, retry.backoff * 2 ** (failures - 1) * random.uniform(1, 1.5)))


class _BadAnswerError(Exception):
    """An answer that is worth another try."""


class _Transfer:
    """What has come of a file so far, over several requests."""

    def __init__(
        self,
        url: str,
        target: Path,
        token: str | None,
        timeout: float,
        on_size: Callable[[int], None],
        on_done: Callable[[int], None],
    ) -> None:
        self.url = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        self.target = target
        self.token = token
        self.timeout = timeout
        self.on_size = on_size
        self.on_done = on_done
        self.redirect = _Redirect()
        self.opener = urllib.request.build_opener(self.redirect)
        self.furthest = 0
        self.restart()

    def restart(self) -> None:
        self.done = 0
        self.digest = hashlib.sha256()
        self.version: str | None = None

    def run(self) -> str:
        """One request; raises unless the file is whole behind it."""
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
        found = self.digest.hexdigest()
        expected = self.redirect.sha256 or found
        if found != expected:
            self.restart()
            raise _BadAnswerError(f"SHA-256 {found[:12]}, the server tells {expected[:12]}")
        return found

    def _begin(self, response: Any) -> int | None:
        if response.status == 206:
            span = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != self.done:
                self.restart()
                raise _BadAnswerError("the server answers with another part than was asked for")
            return int(span[2])
        self.restart()
        tag = response.headers.get("ETag", "")
        weak = not tag or tag.startswith("W/")
        self.version = response.headers.get("Last-Modified") if weak else tag
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal() and not response.chunked:
            raise _BadAnswerError("the server does not tell how much it sends")
        return None if response.chunked else int(length)

    def _copy(self, response: Any, stream: RawIOBase) -> None:
        stream.seek(self.done)
        while block := response.read1(_BLOCK):
            try:
                stream.write(block)
            except OSError as error:
                raise VlkrError(f"cannot write {self.target}: {error.strerror}") from error
            self.digest.update(block)
            self.done += len(block)
            self.furthest = max(self.furthest, self.done)
            self.on_done(self.done)


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Stays on https.

    Attributes:
        sha256: what the Hugging Face hub tells of a large file before it sends one elsewhere.
    """

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


def _retry_after(headers: Message | None) -> float:
    value = headers.get("Retry-After", "") if headers else ""
    return min(float(value), 60.0) if value.isdecimal() else 0.0
