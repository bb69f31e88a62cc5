"""The command line. Only a command that runs is imported, so that help is instant."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from argparse import HelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, TextIO

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
        "vlkr.export.commands:export",
        "write a run's adapted model for open_clip, timm, transformers, ONNX, torch or peft",
    ),
    "predict": Command(
        "vlkr.export.commands:predict", "classify images with an exported model", ("images",)
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

    from vlkr.arguments import explain, kebab, named, normalise, plain, shipped_config
    from vlkr.reporting.table import show
    from vlkr.runtime import is_first_process

    module_name, function_name = COMMANDS[name].function.split(":")
    function = getattr(importlib.import_module(module_name), function_name)
    # Else the parser would import the heavy type of the result, which is no option.
    function.__annotations__.pop("return", None)
    function.__annotations__ = inspect.get_annotations(function, eval_str=True)

    class Parser(ArgumentParser):
        """Shows options in kebab case, and types without Python's decoration."""

        def format_help(self, formatter: HelpFormatter | None = None) -> str:
            return kebab(plain(super().format_help(formatter)).replace("``", ""))

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
    flags = {"json", *(dest for dest, hint in types.items() if hint is bool and positional)}
    for action in parser._actions:
        if types[action.dest] is bool:
            action.nargs, action.const, action.metavar = "?", True, None  # a plain --flag
        elif action.dest in lists:
            action.metavar = f"{action.dest.rpartition('.')[2].upper()} ..."
            action.option_strings = action.option_strings[:1]  # without jsonargparse's --option+
    try:
        normal = normalise(shipped_config(arguments), lists, flags)
        parsed = parser.parse_args(named(normal, positional, lists))
        options = parser.instantiate(parsed).as_dict()
    except ArgumentError as error:
        raise VlkrError(explain(str(error), types)) from error
    options.pop("config", None)
    as_json = options.pop("json")
    result = function(**options)
    if not is_first_process():
        return 0
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        # As wide as the terminal, as $COLUMNS, or in a file as tables need.
        console = Console(width=shutil.get_terminal_size((160, 24)).columns)
        if hasattr(result, "tables"):
            show(result, console)
        else:
            result.show(console)
    return int(getattr(result, "exit_code", 0))
