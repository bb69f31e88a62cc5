"""Between what a user types and the parser: options in its form, its complaints in words."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vlkr.errors import VlkrError
from vlkr.files import read_yaml, resource


def normalise(
    arguments: list[str], lists: Collection[str], flags: Collection[str] = ()
) -> list[str]:
    """Options and values in jsonargparse's form: names as in Python, lists in brackets.

    Flags take a value only where it is true or false.

    >>> normalise(["--data.batch-size", "8", "--blocks", "0", "-1", "--force"], ["blocks"])
    ['--data.batch_size=8', '--blocks=["0", "-1"]', '--force']
    >>> normalise(["--force", "photos"], [], ["force"])
    ['--force', 'photos']
    """
    found: list[str] = []
    values: list[str] = []

    def flush() -> None:
        if values and found and found[-1].startswith("--") and "=" not in found[-1]:
            name = found[-1][2:].rstrip("+")
            if name in lists and not _is_yaml_list(values):
                found[-1] += f"={json.dumps(values)}"
                values.clear()
            elif name not in flags or values[0].lower() in ("true", "false", "yes", "no"):
                found[-1] += f"={values.pop(0)}"
        found.extend(values)
        values.clear()

    for argument in arguments:
        if argument.startswith("--"):
            flush()
            name, equals, value = argument.partition("=")
            found.append("--" + name[2:].replace("-", "_") + equals)
            if equals:
                values.append(value)
                found[-1] = found[-1][:-1]
                flush()
        else:
            values.append(argument)
    flush()
    return found


def named(arguments: list[str], positional: Sequence[str], lists: Collection[str]) -> list[str]:
    """Gives bare values the names of the positional parameters.

    >>> named(["a", "--force", "b", "c"], ["source", "images"], ["images"])
    ['--force', '--source=a', '--images=["b", "c"]']
    """
    found = [argument for argument in arguments if argument.startswith("-")]
    bare = [argument for argument in arguments if not argument.startswith("-")]
    for name in positional:
        if bare:
            values, bare = (bare, []) if name in lists else (bare[:1], bare[1:])
            value = json.dumps(values) if name in lists else values[0]
            found.append(f"--{name}={value}")
    return found + bare


def _is_yaml_list(values: list[str]) -> bool:
    return len(values) == 1 and (values[0].startswith("[") or values[0] == "null")


def kebab(text: str) -> str:
    """Options as they are typed: ``--data.batch-size``."""
    return re.sub(r"--[\w.]+", lambda option: option.group().replace("_", "-"), text)


def plain(text: str) -> str:
    """Types without Python's decoration: ``<class 'pathlib.Path'>`` is ``Path``."""
    text = re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", text)
    return re.sub(r"\b(?:typing|pathlib)\.", "", text)


_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list[int]": "whole numbers",
    "list[float]": "numbers",
    "tuple[float, float]": "two numbers",
    "dict[str, Any]": "a mapping such as '{name: value}', with a space behind the colon",
}


def _in_words(hint: Any) -> str:
    """A type as a user would call it.

    >>> _in_words(float), _in_words(list[int] | None), _in_words(Path)
    ('a number', 'whole numbers', 'Path')
    """
    text = re.sub(r"^Optional\[(.*)\]$", r"\1", plain(str(hint)).replace(" | None", ""))
    return _WORDS.get(text, text)


def explain(error: str, types: dict[str, Any]) -> str:
    """The parser's complaint, as a user would put it.

    >>> explain("the following arguments are required: run, output", {})
    '--run, --output missing'
    >>> explain("unrecognized arguments: --lr=1", {"optimizer.lr": float})
    'unknown option --lr; did you mean --optimizer.lr?'
    """
    if required := re.fullmatch(r"the following arguments are required: (.*)", error):
        return kebab("--" + required[1].replace(", ", ", --") + " missing")
    if wrong := re.match(r'Parser key "([\w.]+)":', error):
        values = re.findall(r"(?:Got|Given) value: (.*)", error)
        if values and wrong[1] in types:
            expected = _in_words(types[wrong[1]])
            return f"{kebab('--' + wrong[1])} expects {expected}, not {values[-1]}"
    if unknown := re.match(r"unrecognized arguments: (\S+)", error):
        name = unknown[1].partition("=")[0]
        if not name.startswith("--"):
            return f"unexpected argument {name!r}"
        return kebab(f"unknown option {name}{_nearest(name[2:], types, '--')}")
    if unknown := re.search(r"(?:Group '(.*)' does not accept option|Option) '([^']*)'", error):
        name = ".".join(filter(None, unknown.groups()))
        return f"unknown option {name!r} in the configuration{_nearest(name, types)}"
    return kebab(error)


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    near = [k for k in known if k.endswith(f".{name}")] or difflib.get_close_matches(
        name, known, n=1
    )
    return f"; did you mean {' or '.join(prefix + k for k in near)}?" if near else ""


def shipped_config(arguments: list[str]) -> list[str]:
    """Lets ``--config configs/...`` name a file that ships, from whichever folder."""
    found = list(arguments)
    for i, argument in enumerate(found):
        name, _, value = argument.partition("=")
        if name != "--config":
            continue
        value = value or (found[i + 1] if i + 1 < len(found) else "")
        path = Path(value)
        if not path.is_file() and value.startswith("configs/"):
            path = resource(value)
        if not path.is_file():
            raise VlkrError(f"no config file {value!r}")
        if "config" in read_yaml(path):
            raise VlkrError(f"{path} names another config; give each with an option of its own")
        if argument == "--config":
            found[i + 1] = str(path)
        else:
            found[i] = f"--config={path}"
    return found
