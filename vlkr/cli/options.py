"""What the signatures of commands share."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar

import yaml
from cyclopts import Parameter

T = TypeVar("T")

Switch = Annotated[bool, Parameter(negative="", show_default=False)]
"""An option that is off unless given, as ``--force``."""


def typed(config: T) -> T:
    """Gives the method options of a configuration their types; the parser leaves them as text.

    Numbers, true, false and null are read as in YAML: ``2`` is an int and ``2.0`` a float.

    Args:
        config: a dataclass; its field ``options`` and those of the dataclasses in it are read.
    """
    changes: dict[str, Any] = {}
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if field.name == "options":
            changes[field.name] = {k.replace("-", "_"): _value(v) for k, v in value.items()}
        elif is_dataclass(value):
            changes[field.name] = typed(value)
        elif isinstance(value, list):
            changes[field.name] = [typed(v) if is_dataclass(v) else v for v in value]
    return replace(config, **changes)  # type: ignore[type-var]


def _value(text: Any) -> Any:
    """Reads a scalar as YAML does, and numbers such as ``1e-3`` too, which YAML takes for text.

    >>> _value("2"), _value("2.0"), _value("1e-3"), _value("true"), _value("mean"), _value(["1"])
    (2, 2.0, 0.001, True, 'mean', [1])
    """
    if isinstance(text, list):
        return [_value(item) for item in text]
    if not isinstance(text, str):
        return text
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
