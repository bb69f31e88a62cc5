"""Prompt templates: named sets, a user's file, or templates as they are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlkr.errors import VlkrError
from vlkr.models.class_names import shipped

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
    """Templates from what a user names; several sources are joined.

    Args:
        given: each a template with the placeholder ``{c}`` or ``{}``; the name of a set, which
            is ``imagenet80`` (also ``openai``: the 80 of Radford et al., 2021) or ``imagenet7``
            (also ``simple``: the 7 that do best), as open_clip has them; or the path of a file
            with a template a line.

    Raises:
        VlkrError: for an empty list, a file that cannot be read, or a template without its
            placeholder.

    >>> resolve_templates(["a photo of a {}.", "{c}"])
    TemplateSet(name='given (2)', templates=('a photo of a {c}.', '{c}'))
    >>> resolve_templates(["imagenet7"]).templates[0]
    'itap of a {c}.'
    """
    if not given:
        raise VlkrError("the list of templates is empty, expected e.g. 'a photo of a {c}.'")
    names: dict[str, None] = {}
    templates: list[str] = []
    for entry in given:
        if "{c}" in entry or "{}" in entry:
            name, lines = "given", [entry]
        elif entry in _NAMED:
            name, lines = entry, list(shipped(_NAMED[entry]))
        elif _is_file(entry):
            name, lines = Path(entry).name, _read(Path(entry))
        else:
            near = difflib.get_close_matches(entry, _NAMED, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known sets: {', '.join(_NAMED)}"
            raise VlkrError(
                f"template {entry!r} lacks the placeholder {{c}}, and is neither the name of a "
                f"set nor a file; {hint}"
            )
        names[name] = None
        templates += [line if "{c}" in line else line.replace("{}", "{c}") for line in lines]
    return TemplateSet(f"{' + '.join(names)} ({len(templates)})", tuple(templates))


def absolute_templates(given: Sequence[str]) -> list[str]:
    """The same, with the paths of files that hold from any working folder."""
    return [str(Path(entry).resolve()) if _is_file(entry) else entry for entry in given]


def _is_file(entry: str) -> bool:
    is_other = "{c}" in entry or "{}" in entry or entry in _NAMED
    return not is_other and entry != "" and Path(entry).is_file()


def _read(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise VlkrError(f"cannot read templates {path}: {error}") from error
    if not lines:
        raise VlkrError(f"{path} holds no template, expected one a line")
    for line in lines:
        if "{c}" not in line and "{}" not in line:
            raise VlkrError(f"{path}: template {line!r} lacks the placeholder {{c}}")
    return lines
