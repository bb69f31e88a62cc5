"""Checkpoints that are whole: written in one step, with a checksum, and read without a pickle."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vlkr.errors import VlkrError
from vlkr.files import atomic_file

# A zip archive ends with the length of its comment, in two bytes, and the comment.
_MARK = b"sha256:"
_LENGTH = len(_MARK) + 2 * hashlib.sha256().digest_size


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's own files, renamed from within their folder, their SHA-256 as zip comment.

    Lightning writes to the system's temporary folder first, which may lie on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes ``checkpoint`` to ``path`` in one step."""
        with atomic_file(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
            with temporary.open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(_LENGTH.to_bytes(2, "little") + _MARK + digest.encode())


def check_checkpoint(path: Path) -> None:
    """Raises :class:`VlkrError` if a checkpoint is damaged, or holds more than tensors and numbers.

    Args:
        path: written by :class:`SealedCheckpoints`.
    """
    try:
        content = path.read_bytes()
        seal = content[-_LENGTH:]
        length = content[-_LENGTH - 2 : -_LENGTH]
        if length != _LENGTH.to_bytes(2, "little") or not seal.startswith(_MARK):
            raise VlkrError(f"{path} is damaged: it does not end with its SHA-256")
        digest = hashlib.sha256(content[: -_LENGTH - 2] + bytes(2)).hexdigest()
        if seal.removeprefix(_MARK) != digest.encode():
            raise VlkrError(f"{path} is damaged: its SHA-256 is {digest[:12]}..., not as written")
        torch.load(path, map_location="cpu", weights_only=True)
    except VlkrError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VlkrError(f"{path} is damaged: {reason}") from error
