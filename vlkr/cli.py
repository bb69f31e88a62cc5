"""The command line. Only a command that runs is imported, so that help is instant."""

from __future__ import annotations

import difflib
import gc
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from argparse import HelpFormatter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO

from vlkr.errors import VlkrError
from vlkr.version import __version__


class Command(NamedTuple):
    """Where a command's function is, and what it does in a line.

    Attributes:
        function: ``module:name``; its parameters are the options.
        summary: for the help.
        positional: parameters that may be given without their names, in order; the last takes
            all that is left if it is a list.
    """

    function: str
    summary: str
    positional: tuple[str, ...] = ()


COMMANDS = {
    "demo": Command("vlkr.demo:demo", "adapt, evaluate and export on what ships, in minutes"),
    "adapt": Command(
        "vlkr.training.adapt:adapt", "few-shot adapt a CLIP model, write a run folder"
    ),
    "evaluate": Command(
        "vlkr.evaluation.evaluate:evaluate",
        "accuracy at home and under shift, zero-shot or adapted",
    ),
    "interpolate": Command(
        "vlkr.evaluation.interpolation:interpolate",
        "between base model and adapter: home against shift, and the best mix",
    ),
    "compare": Command(
        "vlkr.comparison.commands:compare",
        "methods over shots, seeds and learning rates at equal budget, with uncertainty",
    ),
    "dg": Command(
        "vlkr.comparison.commands:dg", "leave one domain out: adapt on the others, test on that one"
    ),
    "transfer": Command(
        "vlkr.comparison.commands:transfer",
        "adapt on one dataset, measure on others: what is gained and what forgotten",
    ),
    "export": Command(
        "vlkr.export.export:export",
        "write a run's adapted model for open_clip, timm, transformers, ONNX, torch or peft",
    ),
    "predict": Command(
        "vlkr.export.predict:predict", "classify images with an exported model", ("images",)
    ),
    "project": Command(
        "vlkr.training.project:project_fine_tune", "turn a full fine-tune into the nearest adapter"
    ),
    "approximate": Command(
        "vlkr.approximation.approximate:approximate",
        "which method follows which spectrum: matrices, trained and in closed form",
    ),
    "spectrum": Command(
        "vlkr.evaluation.spectrum:spectrum",
        "singular values, ranks and norms of the adapted layers of runs",
    ),
    "data pack": Command(
        "vlkr.datasets.pack:pack", "write any dataset as webdataset shards", ("source", "dest")
    ),
    "data verify": Command(
        "vlkr.datasets.verify:verify",
        "decode every image, compare shards with their checksums",
        ("source",),
    ),
    "data info": Command(
        "vlkr.datasets.info:info", "counts, sizes and a contact sheet of a dataset", ("source",)
    ),
    "data list": Command("vlkr.datasets.listing:list_cards", "the datasets that are known by name"),
}


def run() -> int:
    """:func:`main` for a process that ends behind it, at once.

    Python would search everything that was imported for garbage first, which takes seconds.
    """
    status = main()
    gc.freeze()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments, ``sys.argv``'s by default.

    Returns:
        The exit status: 0, a result's own ``exit_code``, 2 for wrong input, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"vlkr {__version__}")
        return 0
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        kin = [known for known in COMMANDS if known.startswith(f"{name} ")]
        if kin and rest in ([], ["-h"], ["--help"]):
            print(_help(name))
            return 0
        unknown = " ".join(arguments[:2]) if kin else name
        return _fail(f"unknown command {unknown!r}; known: {', '.join(kin or COMMANDS)}")
    try:
        with warnings.catch_warnings(), _terminable():
            warnings.showwarning = _show_warning
            return _run(name, rest)
    except VlkrError as error:
        # A data loader's worker puts its traceback in front of the message.
        return _fail(re.split(r"\bvlkr\.[\w.]*Error: ", str(error))[-1])
    except KeyboardInterrupt as error:
        _let_go(error)
        print(f"vlkr: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130


def _let_go(error: BaseException) -> None:
    """Drops what an interruption left half-built; finalizers, such as a loader's, complain then."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__context__
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _help(group: str | None = None) -> str:
    """The help of the program, or of the commands whose names begin with a word, such as data."""
    commands = {
        name: command
        for name, command in COMMANDS.items()
        if group is None or name.startswith(f"{group} ")
    }
    width = max(map(len, commands)) + 2
    columns = min(shutil.get_terminal_size().columns, 100)
    lines = (
        textwrap.fill(
            f"{name:<{width}}{command.summary}",
            columns,
            initial_indent="  ",
            subsequent_indent=" " * (width + 2),
        )
        for name, command in commands.items()
    )
    about = [
        "Adapt CLIP to a few labelled images per class, measure it at home and under",
        "domain shift, and export the result as a plain encoder.",
        "",
    ]
    return "\n".join(
        [
            f"usage: vlkr {f'{group} ' if group else ''}COMMAND [options]",
            "",
            *([] if group else about),
            "commands:",
            *lines,
            "",
            "vlkr COMMAND --help lists a command's options. --config FILE reads them from",
            "YAML, dotted options behind it override; --json prints the result as JSON.",
            "vlkr --version",
        ]
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does, cleanly and with a line.

    Whatever is raised after such a signal counts as KeyboardInterrupt: an extension module that it
    meets while it is imported raises ImportError in its place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and is not ignored
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if received:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _fail(message: str) -> int:
    print(f"vlkr: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"vlkr: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run(name: str, arguments: list[str]) -> int:
    from jsonargparse import ArgumentError, ArgumentParser
    from rich.console import Console

    module_name, function_name = COMMANDS[name].function.split(":")
    function = getattr(importlib.import_module(module_name), function_name)
    # Else the parser would import the heavy type of the result, which is no option.
    function.__annotations__.pop("return", None)
    function.__annotations__ = inspect.get_annotations(function, eval_str=True)

    class Parser(ArgumentParser):
        """Shows options in kebab case, and types without Python's decoration."""

        def format_help(self, formatter: HelpFormatter | None = None) -> str:
            return _kebab(_plain(super().format_help(formatter)).replace("``", ""))

    positional = COMMANDS[name].positional
    parser = Parser(
        prog=" ".join(["vlkr", name, *(word.upper() for word in positional)]),
        description=COMMANDS[name].summary,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the options below")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_function_arguments(function, as_positional=False)
    types = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    lists = {name for name, hint in types.items() if re.search(r"\b(list|tuple)\[", str(hint))}
    # A value behind one of these may be the first positional.
    flags = {
        "json",
        *(n for n, hint in types.items() if hint is bool and COMMANDS[name].positional),
    }
    for action in parser._actions:
        if types[action.dest] is bool:
            action.nargs, action.const, action.metavar = "?", True, None  # a plain --flag
        elif action.dest in lists:
            action.metavar = f"{action.dest.rpartition('.')[2].upper()} ..."
            action.option_strings = action.option_strings[:1]  # without jsonargparse's --option+
    try:
        normal = _normalise(_shipped_config(arguments), lists, flags)
        named = _named(normal, positional, lists)
        parsed = parser.parse_args(named)
        options = parser.instantiate(parsed).as_dict()
    except ArgumentError as error:
        raise VlkrError(_explain(str(error), types)) from error
    options.pop("config", None)
    as_json = options.pop("json")
    result = function(**options)
    if not _is_first_process():
        return 0
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        # As wide as the terminal, as $COLUMNS, or in a file as tables need.
        result.show(Console(width=shutil.get_terminal_size((160, 24)).columns))
    return int(getattr(result, "exit_code", 0))


def _is_first_process() -> bool:
    """Of those that compute side by side, each of which runs the whole command."""
    ranks = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def _normalise(
    arguments: list[str], lists: Collection[str], flags: Collection[str] = ()
) -> list[str]:
    """Options and values in jsonargparse's form: names as in Python, lists in brackets.

    Flags take a value only where it is true or false.

    >>> _normalise(["--data.batch-size", "8", "--blocks", "0", "-1", "--force"], ["blocks"])
    ['--data.batch_size=8', '--blocks=["0", "-1"]', '--force']
    >>> _normalise(["--force", "photos"], [], ["force"])
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


def _named(arguments: list[str], positional: Sequence[str], lists: Collection[str]) -> list[str]:
    """Gives bare values the names of the positional parameters.

    >>> _named(["a", "--force", "b", "c"], ["source", "images"], ["images"])
    ['--force', '--source=a', '--images=["b", "c"]']
    """
    named = [argument for argument in arguments if argument.startswith("-")]
    bare = [argument for argument in arguments if not argument.startswith("-")]
    for name in positional:
        if bare:
            values, bare = (bare, []) if name in lists else (bare[:1], bare[1:])
            value = json.dumps(values) if name in lists else values[0]
            named.append(f"--{name}={value}")
    return named + bare


def _is_yaml_list(values: list[str]) -> bool:
    return len(values) == 1 and (values[0].startswith("[") or values[0] == "null")


def _kebab(text: str) -> str:
    return re.sub(r"--[\w.]+", lambda option: option.group().replace("_", "-"), text)


def _plain(text: str) -> str:
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
    text = re.sub(r"^Optional\[(.*)\]$", r"\1", _plain(str(hint)).replace(" | None", ""))
    return _WORDS.get(text, text)


def _explain(error: str, types: dict[str, Any]) -> str:
    """The parser's complaint, as a user would put it.

    >>> _explain("the following arguments are required: run, output", {})
    '--run, --output missing'
    >>> _explain("unrecognized arguments: --lr=1", {"optimizer.lr": float})
    'unknown option --lr; did you mean --optimizer.lr?'
    """
    if required := re.fullmatch(r"the following arguments are required: (.*)", error):
        return _kebab("--" + required[1].replace(", ", ", --") + " missing")
    if wrong := re.match(r'Parser key "([\w.]+)":', error):
        values = re.findall(r"(?:Got|Given) value: (.*)", error)
        if values and wrong[1] in types:
            expected = _in_words(types[wrong[1]])
            return f"{_kebab('--' + wrong[1])} expects {expected}, not {values[-1]}"
    if unknown := re.match(r"unrecognized arguments: (\S+)", error):
        name = unknown[1].partition("=")[0]
        if not name.startswith("--"):
            return f"unexpected argument {name!r}"
        return _kebab(f"unknown option {name}{_nearest(name[2:], types, '--')}")
    if unknown := re.search(r"(?:Group '(.*)' does not accept option|Option) '([^']*)'", error):
        name = ".".join(filter(None, unknown.groups()))
        return f"unknown option {name!r} in the configuration{_nearest(name, types)}"
    return _kebab(error)


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    near = [k for k in known if k.endswith(f".{name}")] or difflib.get_close_matches(
        name, known, n=1
    )
    return f"; did you mean {' or '.join(prefix + k for k in near)}?" if near else ""


def _shipped_config(arguments: list[str]) -> list[str]:
    """Lets ``--config configs/...`` name a file that ships, from whichever folder."""
    from vlkr.files import read_yaml, resource

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
