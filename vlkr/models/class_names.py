"""Class names, prompts and lists of classes that open_clip and timm ship."""

from __future__ import annotations

import pkgutil
import re

from vlkr.errors import VlkrError

_OPEN_CLIP = ("IMAGENET_CLASSNAMES", "OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES")


def shipped(reference: str) -> tuple[str, ...]:
    """A list that a package ships.

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
        import open_clip

        entries = getattr(open_clip, name)
        return tuple(entry("{c}") if callable(entry) else str(entry) for entry in entries)
    if package == "timm" and re.fullmatch(r"\w+", name):
        try:
            content = pkgutil.get_data("timm.data", f"_info/{name}.txt") or b""
        except FileNotFoundError:
            content = b""
        if content:
            return tuple(content.decode("utf-8").splitlines())
    raise VlkrError(f"no list {reference!r}, expected open_clip:{_OPEN_CLIP[0]} or timm:LIST")
