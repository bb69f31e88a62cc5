"""Nested options, by their dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flattened(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names.

    >>> flattened({"adapter": {"name": "lora", "options": {"rank": 8}}, "seed": 1})
    {'adapter.name': 'lora', 'adapter.options.rank': 8, 'seed': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in options.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What has changed, in words, by the dotted name.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    {'a.c': 'a.c is 3 now and was 2'}
    """
    old, new = flattened(before), flattened(now)
    return {
        key: f"{key} is {new.get(key)} now and was {old.get(key)}"
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key)
    }
