"""Prompt templates and class lists: named sets, those that open_clip and timm ship, files."""

from __future__ import annotations

import difflib
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlkr.errors import VlkrError

_OPEN_CLIP = ("IMAGENET_CLASSNAMES", "OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES")
_NAMED = {
    "imagenet80": "open_clip:OPENAI_IMAGENET_TEMPLATES",
    "openai": "open_clip:OPENAI_IMAGENET_TEMPLATES",
    "imagenet7": "open_clip:SIMPLE_IMAGENET_TEMPLATES",
    "simple": "open_clip:SIMPLE_IMAGENET_TEMPLATES",
}


@dataclass(frozen=True)
class TemplateSet:
    """Prompt templates and where they come from.

    Attributes:
        name: with their number, for captions: ``"imagenet80 (80)"``.
        templates: each with the placeholder ``{c}``.
    """

    name: str
    templates: tuple[str, ...]


def resolve_templates(given: Sequence[str]) -> TemplateSet:
    """Looks up templates by what a user names; several sources are joined.

    Args:
        given: each a template with the placeholder ``{c}`` or ``{}``; the name of a set, which
            is ``imagenet80`` (also ``openai``: the 80 of Radford et al., 2021) or ``imagenet7``
            (also ``simple``: the 7 best of them), as open_clip has them; or the path of a file
            with one template per line.

    Raises:
        VlkrError: for an empty list, a file that cannot be read, or a template without its
            placeholder.

    >>> resolve_templates(["a photo of a {}.", "{c}"])
    TemplateSet(name='given (2)', templates=('a photo of a {c}.', '{c}'))
    >>> resolve_templates(["imagenet7"]).templates[0]
    'itap of a {c}.'
    """
    names: dict[str, None] = {}
    templates: list[str] = []
    for entry in given:
        if "{c}" in entry or "{}" in entry:
            name, lines = "given", [entry]
        elif entry in _NAMED:
            name, lines = entry, list(shipped_list(_NAMED[entry]))
        elif _is_file(entry):
            name, lines = Path(entry).name, _read_templates(Path(entry))
        else:
            near = difflib.get_close_matches(entry, _NAMED, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known sets: {', '.join(_NAMED)}"
            raise VlkrError(
                f"template {entry!r} lacks the placeholder {{c}}, and is neither the name of a "
                f"set nor a file; {hint}"
            )
        names[name] = None
        templates += [line if "{c}" in line else line.replace("{}", "{c}") for line in lines]
    check_templates(templates)
    return TemplateSet(f"{' + '.join(names)} ({len(templates)})", tuple(templates))


def check_templates(templates: Sequence[str]) -> None:
    """Raises :class:`VlkrError` unless every template has the placeholder ``{c}``."""
    if not templates:
        raise VlkrError("the list of templates is empty, expected e.g. 'a photo of a {c}.'")
    for template in templates:
        if "{c}" not in template:
            raise VlkrError(f"template {template!r} lacks the placeholder {{c}}")


def absolute_templates(given: Sequence[str]) -> list[str]:
    """The same, with absolute paths of files."""
    return [str(Path(entry).resolve()) if _is_file(entry) else entry for entry in given]


def resolve_list(value: str | Sequence[str]) -> tuple[str, ...]:
    """A list as it is, or the one that ``package:name`` refers to."""
    return shipped_list(value) if isinstance(value, str) else tuple(value)


def shipped_list(reference: str) -> tuple[str, ...]:
    """Reads a list from the files of a package, without importing it.

    Args:
        reference: ``open_clip:NAME`` with ``IMAGENET_CLASSNAMES``, ``OPENAI_IMAGENET_TEMPLATES`` or
            ``SIMPLE_IMAGENET_TEMPLATES``; or ``timm:NAME`` with the name of one of timm's lists on
            ImageNet, such as ``imagenet_synsets``, ``imagenet_a_indices``, ``imagenet_r_indices``.

    Returns:
        Its entries; prompts with the placeholder ``{c}``.

    Raises:
        VlkrError: if there is no such list.
    """
    package, _, name = reference.partition(":")
    if package == "open_clip" and name in _OPEN_CLIP:
        entries = _open_clip_metadata()[name]
        return tuple(entry("{c}") if callable(entry) else str(entry) for entry in entries)
    if package == "timm" and re.fullmatch(r"\w+", name):
        path = _package_folder("timm") / "data" / "_info" / f"{name}.txt"
        if path.is_file():
            return tuple(path.read_text("utf-8").splitlines())
    raise VlkrError(f"no list {reference!r}, expected open_clip:{_OPEN_CLIP[0]} or timm:LIST")


@cache
def _open_clip_metadata() -> dict[str, Any]:
    # Importing open_clip takes seconds; this module of it imports nothing.
    return runpy.run_path(str(_package_folder("open_clip") / "zero_shot_metadata.py"))


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise VlkrError(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


def _is_file(entry: str) -> bool:
    is_something_else = "{c}" in entry or "{}" in entry or entry in _NAMED
    return not is_something_else and entry != "" and Path(entry).is_file()


def _read_templates(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise VlkrError(f"cannot read templates {path}: {error}") from error
    if not lines:
        raise VlkrError(f"{path} holds no template, expected one per line")
    for line in lines:
        if "{c}" not in line and "{}" not in line:
            raise VlkrError(f"{path}: template {line!r} lacks the placeholder {{c}}")
    return lines
