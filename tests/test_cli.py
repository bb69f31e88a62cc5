import gc
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import small_run, write_clip, write_images

from vlkr import __version__, cli
from vlkr.cli import main
from vlkr.errors import VlkrError


def vlkr(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


# What needs no command


def test_help_is_instant_and_names_every_command():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = vlkr("-m", "vlkr", "--help", check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # seconds
    listed = done.stdout.partition("Commands")[2].partition("Parameters")[0]
    names = [line.split()[1] for line in listed.splitlines() if line[:2] == "│ " and line[2] != " "]
    assert list(dict.fromkeys(name.partition(" ")[0] for name in cli.COMMANDS)) == names[:-2]
    assert "--config" in done.stdout
    assert vlkr("-m", "vlkr", check=True).stdout == done.stdout


def test_help_version_and_wrong_options_import_nothing_heavy():
    code = """
import sys
from vlkr.cli import COMMANDS, main
assert [main(given) for given in ([], ["--help"], ["--version"], ["frobnicate"])] == [0, 0, 0, 2]
for name in COMMANDS:
    assert main([*name.split(), "--help"]) == 0
    assert main([*name.split(), "--nothing", "1"]) == 2
heavy = {"torch", "lightning", "open_clip", "timm", "matplotlib", "scipy", "torchvision"}
print(*sorted(heavy & set(sys.modules)))
"""
    assert vlkr("-c", code, check=True).stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("asked", [[], ["-h"], ["--help"]])
def test_a_group_of_commands_has_its_help(asked, capsys):
    assert main(["data", *asked]) == 0
    text = capsys.readouterr().out
    assert [
        name for name in ("pack", "verify", "info", "list", "adapt") if f"│ {name} " in text
    ] == [
        "pack",
        "verify",
        "info",
        "list",
    ]


def test_a_process_ends_without_searching_for_garbage():
    code = "import gc, sys; from vlkr.cli import run; print(run(), gc.get_freeze_count() > 1000)"
    done = vlkr("-c", code, "--version", check=True)
    assert done.stdout == f"vlkr {__version__}\n0 True\n"


def test_command_is_installed():
    script = Path(sys.executable).with_name("vlkr")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vlkr {__version__}\n"


POSITIONAL = {"predict": ["IMAGES"], "data pack": ["SOURCE", "DEST"]}
POSITIONAL |= {name: ["SOURCE"] for name in ("data verify", "data info")}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    usage, listed = text.split("Parameters", 1)
    assert usage.startswith(f"Usage: vlkr {name} ")
    for positional in POSITIONAL.get(name, []):
        assert usage.splitlines()[0].count(f" {positional}") == 1
        assert listed.count(positional) == 1  # once, not as argument and as option
    for noise in ("<class '", "``", "typing.", "PosixPath", "Args:"):
        assert noise not in text
    names = [word for word in listed.split() if word.startswith("--")]
    assert {"--config", "--json"} <= set(names)
    assert len(names) == len(set(names))
    assert not [word for word in names if "_" in word]
    described = [line for line in listed.splitlines() if line[:7].strip("│* ").startswith("--")]
    assert all(len(line.split("  ")) > 1 for line in described)


# How options are read: a command that gives back what it was called with


class Echo:
    exit_code = 0

    def __init__(self, **options):
        self.options = options

    def to_json(self):
        return self.options

    def tables(self):
        return []

    def lines(self):
        return ["shown"]


def echo(
    output: Path,
    *,
    batch_size: int = 1,
    lr: float = 0.1,
    flip: bool = True,
    names: list[str] | None = None,
    blocks: list[int] | None = None,
    scale: tuple[float, float] = (0.5, 1.0),
) -> Echo:
    """Echoes."""
    return Echo(
        output=str(output),
        batch_size=batch_size,
        lr=lr,
        flip=flip,
        names=names,
        blocks=blocks,
        scale=scale,
    )


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "echo", cli.Command(f"{__name__}:echo", "echo"))

    def call(*arguments):
        assert main(["echo", "--json", *arguments]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "8"], {"batch_size": 8}),
        (["--batch-size=8"], {"batch_size": 8}),
        (["--lr", "-1e-3"], {"lr": -1e-3}),
        (["--flip=false"], {"flip": False}),
        (["--no-flip"], {"flip": False}),
        (["--flip"], {"flip": True}),
        (["--names", "q"], {"names": ["q"]}),
        (["--names", "q", "v"], {"names": ["q", "v"]}),
        (["--names", "[q, v]"], {"names": ["q", "v"]}),
        (["--names=[q, v]"], {"names": ["q", "v"]}),
        (["--names=[]"], {"names": []}),
        (["--names=q"], {"names": ["q"]}),
        (["--names", "1", "a: {c}", 'it\'s, a "b"'], {"names": ["1", "a: {c}", 'it\'s, a "b"']}),
        (["--names", "{c}", "{}"], {"names": ["{c}", "{}"]}),
        (["--names", "a", "--names", "b"], {"names": ["a", "b"]}),
        (["--blocks", "-1"], {"blocks": [-1]}),
        (["--blocks", "0", "-1", "--flip=no"], {"blocks": [0, -1], "flip": False}),
        (["--scale", "0.2", "1"], {"scale": [0.2, 1.0]}),
        (["--scale=[0.2, 1]"], {"scale": [0.2, 1.0]}),
    ],
)
def test_options(call, arguments, expected):
    options = call("--output", "x", *arguments)
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["123", "1e3", "null", "a: b", "with space", "größe", "x=y"])
def test_paths_are_taken_as_they_are(call, name):
    assert call("--output", name)["output"] == name
    assert call(f"--output={name}")["output"] == name
    assert call(name)["output"] == name


def test_options_override_configurations_and_later_files_earlier_ones(call, tmp_path):
    config, other = tmp_path / "c.yaml", tmp_path / "d.yaml"
    config.write_text("batch_size: 3\nnames: [a, b]\nscale: [0.1, 0.2]\nflip: false\n")
    other.write_text("batch-size: 5\nblocks: null\n")
    options = call("--output", "x", "--config", str(config), "--names", "c", "--lr", "2")
    assert (options["batch_size"], options["names"], options["scale"]) == (3, ["c"], [0.1, 0.2])
    assert (options["flip"], options["lr"]) == (False, 2.0)
    assert call("--batch-size=4", f"--config={config}", "--output=x")["batch_size"] == 4
    both = call("x", "--config", str(config), "--config", str(other), "--blocks", "1")
    assert (both["batch_size"], both["names"], both["blocks"]) == (5, ["a", "b"], [1])


def test_method_options_keep_their_types(monkeypatch, capsys, tmp_path):
    """2.0 is a float and 2 an int, wherever it is given."""
    given = {}

    def keep(output, model, pretrained, adapter, *rest):
        given["adapter"] = adapter
        return Echo()

    monkeypatch.setattr("vlkr.training.recipe.adapt", keep)
    config = tmp_path / "c.yaml"
    config.write_text("adapter:\n  options: {rank: 2, alpha: 2.0, use_rslora: true, x: [1, a]}\n")
    for words, expected in (
        (["--config", str(config)], {"rank": 2, "alpha": 2.0, "use_rslora": True, "x": [1, "a"]}),
        (["--adapter.options", "{rank: 8, alpha: 2.0}"], {"rank": 8, "alpha": 2.0}),
        (["--adapter.options.num-terms", "1"], {"num_terms": 1}),
        (
            ["--adapter.options.alpha=1e-3", "--adapter.options.init=eye"],
            {"alpha": 1e-3, "init": "eye"},
        ),
    ):
        assert main(["adapt", "--output", "x", *words]) == 0, capsys.readouterr().err
        options = given["adapter"].options
        assert options == expected
        assert [type(v) for v in options.values()] == [type(v) for v in expected.values()]


def test_methods_of_a_grid_are_names_or_mappings(monkeypatch, capsys, tmp_path):
    given = {}

    def keep(grid, output, **options):
        given["grid"] = grid
        return Echo()

    monkeypatch.setattr("vlkr.comparison.compare.run_compare", keep)
    config = tmp_path / "c.yaml"
    config.write_text("methods: [lora, {name: full, lrs: [1.0e-4], options: {alpha: 2.0}}]\n")
    for words in (
        ["--config", str(config)],
        ["--methods", "lora", "{name: full, lrs: [1.0e-4], options: {alpha: 2.0}}"],
    ):
        assert main(["compare", "--data.root", "x", *words]) == 0, capsys.readouterr().err
        lora, full = given["grid"].methods
        assert getattr(lora, "name", lora) == "lora"
        assert (full.name, full.lrs, full.options) == ("full", [1e-4], {"alpha": 2.0})
    assert given["grid"].data.root == Path("x")


def test_shipped_configuration_is_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["adapt", "--config", "configs/fewshot/digits.yaml", "--output", "x"]
    assert main([*arguments, "--seed", "-1"]) == 2
    assert "seed -1 is out of range" in capsys.readouterr().err


def test_result_is_shown_without_json_and_by_the_first_process_alone(call, capsys, monkeypatch):
    assert main(["echo", "--output", "x"]) == 0
    assert capsys.readouterr().out == "shown\n"
    monkeypatch.setenv("RANK", "1")
    assert main(["echo", "--output", "x", "--json"]) == 0
    assert capsys.readouterr().out == ""


# How a command ends


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (VlkrError("two\n  lines"), 2, "vlkr: error: two lines"),
        (KeyboardInterrupt(), 130, "vlkr: interrupted"),
        (KeyboardInterrupt("go on so"), 130, "vlkr: interrupted: go on so"),
    ],
)
def test_exit_status(call, monkeypatch, capsys, error, status, message):
    def fail(output: Path) -> Echo:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "echo", fail)
    assert main(["echo", "--output", "x"]) == status
    assert capsys.readouterr() == ("", f"{message}\n")


def test_a_result_has_its_own_exit_status(call, monkeypatch):
    monkeypatch.setattr(Echo, "exit_code", 1)
    assert main(["echo", "--output", "x"]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_an_import_takes_for_its_own_failure(
    call, monkeypatch, capsys, number
):
    """As matplotlib's and other extension modules do."""

    def load(output: Path) -> Echo:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(sys.modules[__name__], "echo", load)
    # Whoever runs the tests in the background may have it ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        assert main(["echo", "--output", "x"]) == 130
        assert capsys.readouterr() == ("", "vlkr: interrupted\n")
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_what_an_interruption_leaves_half_built_is_silent(call, monkeypatch, capsys):
    """As a loader whose workers are just being started."""
    heard = []

    class HalfBuilt:
        def __del__(self):
            raise AttributeError("no attribute '_workers_status'")

    def load(output: Path) -> Echo:
        left = HalfBuilt()
        left.itself = left
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[__name__], "echo", load)
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    assert main(["echo", "--output", "x"]) == 130
    gc.collect()
    assert not heard
    assert capsys.readouterr() == ("", "vlkr: interrupted\n")


def test_a_bug_is_not_hidden(call, monkeypatch):
    def fail(output: Path) -> Echo:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules[__name__], "echo", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["echo", "--output", "x"])


# From the command line to the run folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "colors")


def test_run_repeats_from_its_own_configuration(small, colors, tmp_path, capsys):
    run = small_run(tmp_path / "run", small, colors).output
    arguments = ["adapt", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    before = json.loads((run / "metrics.json").read_text())
    assert printed["results"] == before["results"]
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()
    assert (tmp_path / "again" / "config.yaml").read_text() == (run / "config.yaml").read_text()


def test_targets_and_dotted_options_reach_the_run(small, colors, tmp_path, capsys):
    command = (
        f"adapt --model {small} --data.root {colors} --data.shots 2 --data.batch-size 4 "
        "--data.min-steps-per-epoch 2 --adapter.name lora --adapter.targets q v --adapter.blocks -1"
        " --adapter.towers visual --adapter.options.rank 2 --trainer.epochs 1 --seed 3"
        f" --trainer.no-progress --output {tmp_path / 'run'}"
    )
    assert main(command.split()) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "256 parameters trained in" in printed  # two LoRAs of rank 2 on 32 x 32
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    places = [(module["module"], module["name"]) for module in adapter["modules"]]
    block = "visual.transformer.resblocks.1.attn"
    assert places == [(block, "q"), (block, "v")]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["seed"] == 3
    assert config["data"]["batch_size"] == 4


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(small, tmp_path, capsys):
    root = write_images(tmp_path / "d", per_class=1, splits=("train", "test"))
    command = (
        f"adapt --model {small} --data.root {root} --data.shots 2 --data.min-steps-per-epoch 1 "
        f"--trainer.epochs 1 --trainer.progress=false --output {tmp_path / 'run'}"
    )
    assert main(command.split()) == 0
    first, second = capsys.readouterr().err.split("\n")[:2]
    assert first == "vlkr: warning: no class has 2 images to train on: taken as 1 shot"
    assert not second.startswith("vlkr: warning")
