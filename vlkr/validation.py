"""Checks plain dataclasses with pydantic; an error is one line that names field and value."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from vlkr.errors import VlkrError

T = TypeVar("T")
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def check_ranges(config: Any, section: str) -> None:
    """Raises :class:`VlkrError` naming the first field of a dataclass that is not valid.

    Args:
        config: a dataclass whose annotations give types and ranges.
        section: its name in messages, such as ``optimizer``.
    """
    from_plain(type(config), asdict(config), section)


def from_plain(cls: type[T], value: Any, section: str) -> T:
    """Makes a dataclass from what YAML or JSON hold; unknown keys are ignored.

    Args:
        cls: the dataclass; keys that are missing get its defaults.
        value: a mapping by field name.
        section: its name in messages.

    Raises:
        VlkrError: for a value of another type, or out of range.
    """
    if not isinstance(value, dict):
        raise VlkrError(f"{section} is {value!r:.80}, expected a mapping")
    try:
        # As JSON, where a list stands for a tuple and a string for a path.
        config: T = _validator(cls).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise VlkrError(describe_error(error, section)) from error
    return config


def describe_error(error: ValidationError, section: str) -> str:
    """Returns one line for pydantic's first error: field, value and what was expected."""
    first = error.errors(include_url=False)[0]
    name = ".".join([section, *map(str, first["loc"])])
    return f"{name} is {first['input']!r:.80}: {first['msg'].replace('Input should', 'it should')}"


def _validator(cls: type[Any]) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]
