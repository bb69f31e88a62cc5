"""A loopback HTTP server that serves a folder, and misbehaves as it is told."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Serves the files below ``folder``.

    Attributes:
        plan: what to do at each of the next requests of a file, if not to behave: a status; or
            ``drop``, ``reset`` (after half of what is left), ``short`` (end as if that half were
            all, without a length), ``stall``, ``refuse`` (no answer at all), ``lie`` (tell one
            byte more than there is), ``wrong range``, or ``redirect URL``.
        ranges: answer requests for a part with the part.
        tags: send an ETag.
        requests: path, and Range, of each request so far.
        headers: of each request so far.
        extra: headers of each answer.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.plan: dict[str, list[int | str]] = {}
        self.ranges = self.tags = True
        self.requests: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.extra: dict[str, str] = {}
        self.released = threading.Event()

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        path = unquote(urlsplit(self.path).path).lstrip("/")
        server.requests.append((path, self.headers.get("Range")))
        server.headers.append(dict(self.headers))
        steps = server.plan.get(path, [])
        step = steps.pop(0) if steps else "behave"
        file = server.folder / path
        if step == "refuse":
            return
        if isinstance(step, str) and step.startswith("redirect "):
            self._head(302, {"Location": step.partition(" ")[2], "Content-Length": "0"})
            return
        if isinstance(step, int) or not file.is_file():
            status = step if isinstance(step, int) else 404
            self._head(status, {"Content-Length": "0"})
            return
        data = file.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
        start, status, headers = 0, 200, {}
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") in (None, tag):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            status = 206
            first = start + (step == "wrong range")
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if server.tags:
            headers["ETag"] = tag
        body = data[start:]
        if step != "short":
            headers["Content-Length"] = str(len(body) + (step == "lie"))
        self._head(status, headers)
        if step in ("drop", "reset", "short", "stall"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.wfile.flush()
        if step == "stall":
            server.released.wait(20)
        if step == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, **self.server.extra}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of ``folder`` while the block runs; no proxy stands between."""
    with mock.patch.dict(os.environ, no_proxy="127.0.0.1"), Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
