"""Exports on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

# Of whichever HTTP library this version of the hub's client is built on.
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from vlkr.errors import VlkrError


def is_repository(name: str) -> bool:
    """Whether a name could be one on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_repository(repository: str) -> None:
    """Raises :class:`VlkrError` for a name that is none, or if there is no token to write with."""
    if not is_repository(repository):
        raise VlkrError(f"{repository!r} is no repository, expected ORG/NAME")
    if get_token() is None:
        raise VlkrError("no token of the hub to push with: set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, repository: str) -> str:
    """Uploads a folder as one commit, into a new repository if there is none.

    Returns:
        The repository's address.

    Raises:
        VlkrError: if the hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by vlkr")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise VlkrError(
            f"wrote {folder}, and could not push it to {repository}: {reason}"
        ) from error
    return str(address)
