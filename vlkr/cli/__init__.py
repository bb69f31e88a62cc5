"""The command line. Only the module of the command that runs is imported, so help is instant."""

from __future__ import annotations

import difflib
import gc
import json
import re
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple, TextIO

import yaml
from cyclopts import (
    App,
    CycloptsError,
    Parameter,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)
from cyclopts.config import Dict
from rich.console import Console

from vlkr.errors import VlkrError
from vlkr.files import flattened, read_yaml, resource
from vlkr.reporting.table import show
from vlkr.runtime import is_first_process
from vlkr.version import __version__


class Command(NamedTuple):
    """A command: where its function is, ``module:name``, and a line for the help.

    The function's parameters are the options; it returns a result that is shown or printed.
    """

    function: str
    summary: str


COMMANDS = {
    "demo": Command("vlkr.cli.demo:demo", "Run adapt, evaluate and export on bundled data."),
    "adapt": Command("vlkr.cli.adapt:adapt", "Adapt a CLIP model to a few labeled images."),
    "evaluate": Command(
        "vlkr.cli.evaluate:evaluate", "Evaluate a model in-distribution and under domain shift."
    ),
    "interpolate": Command(
        "vlkr.cli.evaluate:interpolate",
        "Interpolate between base and adapted weights (WiSE-FT).",
    ),
    "compare": Command(
        "vlkr.cli.grids:compare",
        "Compare methods over shots, seeds and learning rates at a matched parameter count.",
    ),
    "dg": Command(
        "vlkr.cli.grids:dg", "Leave one domain out: adapt on the others, test on that one."
    ),
    "transfer": Command(
        "vlkr.cli.grids:transfer", "Adapt on one dataset and evaluate on others: gain, forgetting."
    ),
    "export": Command(
        "vlkr.cli.export:export",
        "Export an adapted model for open_clip, timm, transformers, ONNX, torch or peft.",
    ),
    "predict": Command("vlkr.cli.export:predict", "Classify images with an exported model."),
    "project": Command("vlkr.cli.adapt:project", "Turn a full fine-tune into the nearest adapter."),
    "approximate": Command(
        "vlkr.cli.approximate:approximate",
        "Benchmark how well adapters approximate given matrices.",
    ),
    "spectrum": Command(
        "vlkr.cli.evaluate:spectrum",
        "Show singular values, ranks and norms of the adapted layers of runs.",
    ),
    "data pack": Command("vlkr.cli.data:pack", "Write any dataset as webdataset shards."),
    "data verify": Command(
        "vlkr.cli.data:verify", "Decode every image and compare shards with their checksums."
    ),
    "data info": Command(
        "vlkr.cli.data:info", "Show counts, sizes and a contact sheet of a dataset."
    ),
    "data list": Command("vlkr.cli.data:list_cards", "List registered datasets."),
}


def run() -> int:
    """Runs :func:`main` in a process that ends right after it.

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
    words = list(_words(sys.argv[1:] if argv is None else argv))
    try:
        with warnings.catch_warnings(), _terminable():
            warnings.showwarning = _show_warning
            return int(_app(words).meta(words) or 0)
    except CycloptsError as error:
        return _fail(_explain(error))
    except VlkrError as error:
        # A data loader's worker puts its traceback in front of the message.
        return _fail(re.split(r"\bvlkr\.[\w.]*Error: ", str(error))[-1])
    except KeyboardInterrupt as error:
        _let_go(error)
        print(f"vlkr: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130


def _app(words: Sequence[str]) -> App:
    """Returns the parser of all commands, whose meta app reads ``--config`` and ``--json``.

    The one that is called in these words has its whole docstring as help, the others a line.
    """
    app = App(
        name="vlkr",
        help="Adapt CLIP to a few labeled images per class, evaluate it in-distribution and under "
        "domain shift, and export the result as a plain encoder.",
        version=f"vlkr {__version__}",
        help_format="rst",
        default_parameter=Parameter(
            consume_multiple=True, negative_iterable=(), show_default=_shown_default
        ),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    data = App(name="data", help="Pack, verify, describe and list datasets.", sort_key=99)
    app.command(data)
    for place, (name, command) in enumerate(COMMANDS.items()):
        group, _, last = name.rpartition(" ")
        is_called = list(words[: name.count(" ") + 1]) == name.split()
        (data if group else app).command(
            command.function,
            name=last,
            help=None if is_called else command.summary,
            sort_key=place,
        )

    app.meta.suppress_keyboard_interrupt = False

    @app.meta.default
    def launch(
        *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            list[Path] | None, Parameter(consume_multiple=False, show_default=False)
        ] = None,
        json: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    ) -> int:
        """Reads the options that all commands have.

        Args:
            words: the command and its own options.
            config: YAML file with the options of the command; those given here override it.
            json: print the result as JSON.
        """
        app.config = tuple(map(_read_config, reversed(config or [])))
        result = app(words)
        return 0 if result is None else _present(result, json)

    return app


def _read_config(path: Path) -> Dict:
    """Reads a configuration; ``configs/...`` names one that ships, from whichever folder."""
    given = path
    if not path.is_file() and path.parts[:1] == ("configs",):
        path = resource(str(path))
    if not path.is_file():
        raise VlkrError(f"no config file {str(given)!r}")
    options = read_yaml(path)
    if "config" in options:
        raise VlkrError(f"{path} names another config; give each with an option of its own")
    # By dotted names, for the parser passes over keys that are names of commands, such as data.
    options = flattened(options)
    for name in options.keys() & {command.partition(" ")[0] for command in COMMANDS}:
        raise VlkrError(f"unknown option {name!r} in {path}")
    return Dict(options, use_commands_as_keys=False, source=str(path))


def _present(result: Any, as_json: bool) -> int:
    """Prints a command's result, in the first of several processes, and returns its exit status."""
    if not is_first_process():
        return 0
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        # As wide as the terminal, as $COLUMNS, or in a file as tables need.
        console = Console(width=shutil.get_terminal_size((160, 24)).columns)
        show(result, console)
    return int(result.exit_code)


def _words(arguments: Sequence[str]) -> Iterator[str]:
    """Spells YAML's lists as separate words, and its mappings as the JSON that the parser reads.

    A prompt such as ``{c}`` stays as it is.

    >>> list(_words(["--blocks=[0, -1]", "--adapter.options={rank: 8}", "{c}"]))
    ['--blocks', '0', '-1', '--adapter.options={"rank": 8}', '{c}']
    """
    for word in arguments:
        parts = re.fullmatch(r"(--[\w.-]+=)?(\[.*\]|\{.*\})", word, re.DOTALL)
        try:
            value = yaml.safe_load(parts[2]) if parts else None
        except yaml.YAMLError:
            value = None
        if parts and isinstance(value, list):
            yield from [parts[1][:-1]] if parts[1] else []
            yield from (json.dumps(v) if isinstance(v, dict) else str(v) for v in value)
        elif parts and isinstance(value, dict) and None not in value.values():
            yield (parts[1] or "") + json.dumps(value)
        else:
            yield word


def _shown_default(value: Any) -> str | None:
    if value is None or value is False or value == {}:
        return None
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _explain(error: CycloptsError) -> str:
    """Returns the parser's complaint in one line, with the nearest option."""
    if isinstance(error, UnknownCommandError):
        word = " ".join([*(error.command_chain or ()), (error.unused_tokens or [""])[0]])
        group = word.rpartition(" ")[0]
        known = [name for name in COMMANDS if name.startswith(group and f"{group} ")]
        return f"unknown command {word!r}{_nearest(word, known)} (known: {', '.join(known)})"
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument {(error.unused_tokens or [''])[0]!r}"
    if isinstance(error, UnknownOptionError):
        name = (error.token.keyword or error.token.value).partition("=")[0]
        known = [option for argument in error.argument_collection for option in argument.names]
        if error.token.source != "cli":
            name = name.strip("[]")
            nearest = _nearest(name.replace("_", "-"), [option[2:] for option in known])
            return f"unknown option {name!r} in {error.token.source}{nearest.replace('-', '_')}"
        if not name.startswith("--"):
            return f"unexpected argument {name!r}"
        return f"unknown option {name}{_nearest(name, known)}"
    if isinstance(error, ValidationError) and error.argument is not None:
        from pydantic import ValidationError as OutOfRange

        from vlkr.validation import describe_error

        assert isinstance(error.__cause__, OutOfRange)  # no other validator is in use

        return describe_error(error.__cause__, error.argument.name.lstrip("-"))
    text = re.sub(r'"?\[([\w.]+)\]"?', r"\1", str(error))
    return text[:1].lower() + text[1:].rstrip(".")


def _nearest(name: str, known: Sequence[str]) -> str:
    last = name.rpartition(".")[2].lstrip("-")
    near = [option for option in known if option.endswith(f".{last}")]
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


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
