"""The command line. Only a command that runs is imported, so that help is instant."""

from __future__ import annotations

import importlib
import json
import re
import sys
from argparse import HelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlkr.errors import VlkrError
from vlkr.version import __version__


class Command(NamedTuple):
    """Where a command's function is, and what it does in a line."""

    function: str
    summary: str


COMMANDS = {
    "demo": Command("vlkr.demo:demo", "adapt, evaluate and export on what ships, in minutes"),
    "adapt": Command(
        "vlkr.training.adapt:adapt", "few-shot adapt a CLIP model, write a run folder"
    ),
    "evaluate": Command(
        "vlkr.evaluation.zero_shot:evaluate",
        "accuracy at home and under shift, zero-shot or adapted",
    ),
    "export": Command(
        "vlkr.export.open_clip:export", "write a run's merged model as a plain open_clip folder"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments, ``sys.argv``'s by default.

    Returns:
        The exit status: 0, 2 for wrong input, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"vlkr {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    try:
        return _run(name, rest)
    except VlkrError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("vlkr: interrupted", file=sys.stderr)
        return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: vlkr COMMAND [options]\n\n"
        "Adapt CLIP to a few labelled images per class, measure it at home and under domain\n"
        "shift, and export the result as a plain encoder.\n\ncommands:\n" + "\n".join(lines) + "\n"
        "\nvlkr COMMAND --help lists a command's options; --config FILE reads them from YAML, with\n"
        + "\n\n"
        "vlkr COMMAND --help lists a command's options; --config FILE reads them from YAML, with\n"
        "dotted overrides behind it; --json prints the result as JSON. vlkr --version"
    )


def _fail(message: str) -> int:
    print(f"vlkr: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _run(name: str, arguments: list[str]) -> int:
    from jsonargparse import ArgumentError, ArgumentParser
    from rich.console import Console

    module_name, function_name = COMMANDS[name].function.split(":")
    function = getattr(importlib.import_module(module_name), function_name)

    class Parser(ArgumentParser):
        """Shows options in kebab case."""

        def format_help(self, formatter: HelpFormatter | None = None) -> str:
            text = super().format_help(formatter)
            return re.sub(r"--[\w.]+", lambda m: m.group().replace("_", "-"), text)

    parser = Parser(prog=f"vlkr {name}", description=COMMANDS[name].summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the options below")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_function_arguments(function, as_positional=False)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const, action.metavar = "?", True, None  # a plain --flag
    try:
        parsed = parser.parse_args(_normalise(_shipped_config(arguments)))
        options = parser.instantiate_classes(parsed).as_dict()
    except ArgumentError as error:
        raise VlkrError(str(error)) from error
    options.pop("config", None)
    as_json = options.pop("json")
    result = function(**options)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        result.show(Console())
    return 0


def _normalise(arguments: list[str]) -> list[str]:
    """``--data.batch-size 8`` becomes ``--data.batch_size=8``, ``--blocks 0 1`` a list.

    jsonargparse knows options by their names in Python, and lists in brackets.
    """
    found: list[str] = []
    values: list[str] = []

    def flush() -> None:
        if values:
            many = len(values) > 1
            found[-1] += "=" + (json.dumps(values) if many else values[0])
            values.clear()

    for argument in arguments:
        if argument.startswith("--"):
            flush()
            name, equals, value = argument.partition("=")
            found.append("--" + name[2:].replace("-", "_") + equals + value)
        elif found and "=" not in found[-1]:
            values.append(argument)
        else:
            flush()
            found.append(argument)
    flush()
    return found


def _shipped_config(arguments: list[str]) -> list[str]:
    """Lets ``--config configs/...`` name a file that ships, from whichever folder."""
    from vlkr.files import resource

    found = list(arguments)
    for i, argument in enumerate(found):
        name, _, value = argument.partition("=")
        if name != "--config":
            continue
        value = value or (found[i + 1] if i + 1 < len(found) else "")
        if not Path(value).is_file():
            if not value.startswith("configs/") or not resource(value).is_file():
                raise VlkrError(f"no config file {value!r}")
            shipped = str(resource(value))
            if argument == "--config":
                found[i + 1] = shipped
            else:
                found[i] = f"--config={shipped}"
    return found
