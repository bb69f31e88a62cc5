import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import small_run, tree, write_clip, write_images, write_shards, write_tar

from vlkr import __version__, cli
from vlkr.cli import main
from vlkr.errors import VlkrError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="module")
def run(tmp_path_factory, small, colors):
    return small_run(tmp_path_factory.mktemp("runs") / "run", small, colors).output


def vlkr(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


# What needs no command


def test_help_is_instant_and_names_every_command():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = vlkr("-m", "vlkr", "--help", check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
    assert done.stdout.count("vlkr COMMAND --help") == 1
    assert vlkr("-m", "vlkr", check=True).stdout == done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["frobnicate"]])
def test_imports_nothing_heavy(arguments):
    code = (
        "import sys; from vlkr.cli import main; main(sys.argv[1:]); "
        "print(*sorted({'torch', 'lightning', 'open_clip', 'jsonargparse'} & set(sys.modules)))"
    )
    assert vlkr("-c", code, *arguments, check=True).stdout.splitlines()[-1] == ""


def test_help_and_wrong_options_of_commands_import_nothing_heavy():
    code = """
import sys
from vlkr.cli import COMMANDS, main
for name in COMMANDS:
    try:
        main([*name.split(), "--help"])
    except SystemExit:
        pass
    assert main([*name.split(), "--nothing", "1"]) == 2
print(*sorted({"torch", "lightning", "open_clip", "matplotlib", "scipy"} & set(sys.modules)))
"""
    assert vlkr("-c", code, check=True).stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("asked", [[], ["-h"], ["--help"]])
def test_a_group_of_commands_has_its_help(asked, capsys):
    assert main(["data", *asked]) == 0
    text = capsys.readouterr().out
    listed = {line.partition("  ")[0] for line in text.replace("\n  ", "\n").splitlines()}
    assert listed & set(cli.COMMANDS) == {"data pack", "data verify", "data info", "data list"}


def test_an_unknown_command_of_a_group_is_named_in_full(capsys):
    assert main(["data", "pakc", "--help"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("vlkr: error: unknown command 'data pakc'; known: data pack,")


def test_a_process_ends_without_searching_for_garbage():
    code = "import gc, sys; from vlkr.cli import run; print(run(), gc.get_freeze_count() > 1000)"
    done = vlkr("-c", code, "--version", check=True)
    assert done.stdout.splitlines()[-1] == "0 True"


def test_version():
    assert vlkr("-m", "vlkr", "--version", check=True).stdout == f"vlkr {__version__}\n"


def test_command_is_installed():
    script = Path(sys.executable).with_name("vlkr")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vlkr {__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name, capsys):
    with pytest.raises(SystemExit) as raised:
        main([*name.split(), "--help"])
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    usage = " ".join([name, *map(str.upper, cli.COMMANDS[name].positional)])
    assert text.startswith(f"usage: vlkr {usage} [")
    assert cli.COMMANDS[name].summary.split()[0] in text
    for noise in ("<class '", "``", "typing."):
        assert noise not in text
    options = [word for word in text.split() if word.startswith("--")]
    assert not [option for option in options if "_" in option]


# How options are read: a command that gives back what it was called with


class Echo:
    def __init__(self, **options):
        self.options = options

    def to_json(self):
        return self.options

    def show(self, console):
        console.print("shown")


def echo(
    output: Path,
    batch_size: int = 1,
    lr: float = 0.1,
    flip: bool = True,
    names: list[str] | None = None,
    blocks: list[int] | None = None,
    scale: tuple[float, float] = (0.5, 1.0),
    options: dict[str, float] | None = None,
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
        options=options,
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
        (["--batch_size", "8"], {"batch_size": 8}),
        (["--lr", "-1e-3"], {"lr": -1e-3}),
        (["--flip", "false"], {"flip": False}),
        (["--flip=false", "--flip"], {"flip": True}),
        (["--names", "q"], {"names": ["q"]}),
        (["--names", "q", "v"], {"names": ["q", "v"]}),
        (["--names", "[q, v]"], {"names": ["q", "v"]}),
        (["--names=[q, v]"], {"names": ["q", "v"]}),
        (["--names=q"], {"names": ["q"]}),
        (["--names", "null"], {"names": None}),
        (["--names", "1", "a: {c}", 'it\'s, a "b"'], {"names": ["1", "a: {c}", 'it\'s, a "b"']}),
        (["--names", "a", "--names+", "b"], {"names": ["a", "b"]}),
        (["--blocks", "-1"], {"blocks": [-1]}),
        (["--blocks", "0", "-1", "--flip", "no"], {"blocks": [0, -1], "flip": False}),
        (["--scale", "0.2", "1"], {"scale": [0.2, 1.0]}),
        (["--options", "{alpha: 2}"], {"options": {"alpha": 2}}),
        (["--options.alpha", "2"], {"options": {"alpha": 2}}),
    ],
)
def test_options(call, arguments, expected):
    found = call("--output", "x", *arguments)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["123", "1e3", "null", "a: b", "with space", "größe", "x=y"])
def test_paths_are_taken_as_they_are(call, name):
    assert call("--output", name)["output"] == name
    assert call(f"--output={name}")["output"] == name


def test_configuration_and_options_behind_it(call, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("batch_size: 3\nnames: [a, b]\nscale: [0.1, 0.2]\nflip: false\n")
    found = call("--output", "x", "--config", str(config), "--names", "c", "--lr", "2")
    assert (found["batch_size"], found["names"], found["scale"]) == (3, ["c"], [0.1, 0.2])
    assert (found["flip"], found["lr"]) == (False, 2.0)
    assert call("--batch-size=4", f"--config={config}", "--output=x")["batch_size"] == 3


def test_shipped_configuration_is_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["adapt", "--config", "configs/fewshot/digits.yaml", "--output", "x"]
    assert main([*arguments, "--seed", "-1"]) == 2
    assert "seed -1 is out of range" in capsys.readouterr().err


def test_result_is_shown_without_json(call, capsys):
    assert main(["echo", "--output", "x"]) == 0
    assert capsys.readouterr().out == "shown\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output missing"),
        (["--output"], "--output: expected one argument"),
        (["--output", "x", "y"], "unexpected argument 'y'"),
        (["y", "--output", "x"], "unexpected argument 'y'"),
        (["--output", "x", "--flip", "false", "y"], "unexpected argument 'y'"),
        (["--output", "x", "--batch-sise", "1"], "--batch-sise; did you mean --batch-size?"),
        (["--output", "x", "--outp", "y"], "unknown option --outp; did you mean --output?"),
        (["--output", "x", "--batch-size", "two"], "--batch-size expects a whole number, not two"),
        (["--output", "x", "--lr", "nan"], "--lr expects a number, not nan"),
        (["--output", "x", "--flip", "maybe"], "--flip expects true or false, not maybe"),
        (["--output", "x", "--blocks", "a"], "--blocks expects whole numbers, not ['a']"),
        (["--output", "x", "--scale", "1"], "--scale expects two numbers, not ['1']"),
        (["--output", "x", "--config"], "no config file ''"),
        (["--output", "x", "--config", "nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["--output", "x", "--config", "configs/zz.yaml"], "no config file 'configs/zz.yaml'"),
    ],
)
def test_wrong_options_are_one_line(call, capsys, arguments, message):
    assert main(["echo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("vlkr: error: ")
    assert line.endswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_size: [1\nlr: }", "c.yaml is not valid YAML"),
        ("\tbatch_size: 1", "c.yaml is not valid YAML"),
        ("", "c.yaml holds nothing, expected a mapping"),
        ("- a\n- b", "c.yaml holds a list, expected a mapping"),
        (
            "batchsize: 1",
            "unknown option 'batchsize' in the configuration; did you mean batch_size?",
        ),
        ("batch_size: two", "--batch-size expects a whole number, not two"),
    ],
)
def test_wrong_configurations_are_one_line(call, capsys, tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    assert main(["echo", "--output", "x", "--config", str(tmp_path / "c.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("vlkr: error: ")
    assert message in line


def test_group_of_an_option_is_suggested(capsys, tmp_path):
    assert main(["adapt", "--output", str(tmp_path / "x"), "--lr", "1"]) == 2
    assert capsys.readouterr().err.endswith("unknown option --lr; did you mean --optimizer.lr?\n")
    (tmp_path / "c.yaml").write_text("adapter:\n  nme: lora\n")
    arguments = ["adapt", "--output", str(tmp_path / "x"), "--config", str(tmp_path / "c.yaml")]
    assert main(arguments) == 2
    assert "unknown option 'adapter.nme' in the conf" in capsys.readouterr().err


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


# Wrong input, by the whole road


def corrupt_image(folder):
    root = write_images(folder, per_class=6, splits=("train", "test"))
    for i in range(6):
        (root / "train" / "red" / f"{i}.png").write_bytes(b"garbage")
    return root


def empty_class(folder):
    root = write_images(folder, per_class=2)
    for path in (root / "red").iterdir():
        path.unlink()
    return root


def truncated_tar(folder):
    root = write_shards(folder)
    shard = root / "train" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    return root


def missing_shard(folder):
    root = write_shards(folder)
    (root / "train" / "1.tar").unlink()
    return root


def label_out_of_range(folder):
    root = write_shards(folder)
    write_tar(root / "train" / "0.tar", [("sample", b"", 3)])
    return root


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("frobnicate", "unknown command 'frobnicate'; known: demo, adapt"),
        ("adapt --model ViT-B-33 --data.name digits", "unknown model 'ViT-B-33'; did you mean"),
        ("adapt --model ViT-B-32 --data.name digits", "needs its weights named by --pretrained"),
        (
            "adapt --model ViT-B-32 --pretrained openia --data.name digits",
            "pretrained 'openia' is neither a file nor a tag of ViT-B-32",
        ),
        ("adapt --model SMALL --data.name digits --adapter.name lra", "unknown adapter 'lra'"),
        (
            "adapt --model SMALL --data.name digits --adapter.options.rank 8",
            "adapter 'kradapter' has no option 'rank'",
        ),
        ("adapt --model SMALL --data.name digts", "no dataset 'digts'"),
        ("adapt --model SMALL", "no dataset: give --data.name CARD or --data.root FOLDER"),
        ("adapt --model SMALL --data.root /nowhere", "no folder at data root /nowhere"),
        ("adapt --model SMALL --data.name digits --adapter.targets zz", "target 'zz' matches no"),
        ("adapt --model SMALL --data.name digits --adapter.towers zz", "unknown tower 'zz'"),
        ("adapt --model SMALL --data.name digits --data.shots 0", "data.shots 0 is too small"),
        ("adapt --model SMALL --data.name digits --optimizer.lr .nan", "optimizer.lr nan is out"),
        ("adapt --model SMALL --data.name digits --optimizer.lr .inf", "optimizer.lr inf is out"),
        ("adapt --model SMALL --data.name digits --resume", "nothing to resume"),
        (
            "adapt --model SMALL --data.name digits --trainer.accelerator abacus",
            "trainer.accelerator 'abacus'",
        ),
        ("evaluate --model SMALL --device abacus", "device 'abacus' is not available"),
        ("evaluate --run /nowhere", "no run folder at /nowhere"),
        ("export --run /nowhere", "no run folder at /nowhere"),
        ("export --run OTHER", "was made for another base"),
        (corrupt_image, "is not an image in a known format"),
        (empty_class, "class 'red' is empty"),
        (truncated_tar, "1.tar: unexpected end of data"),
        (missing_shard, "1.tar is missing"),
        (label_out_of_range, "label 3, expected below 3"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    command, message, small, run, tmp_path, tmp_path_factory, capsys
):
    if callable(command):
        root = command(tmp_path_factory.mktemp("data") / "d")
        command = f"adapt --model SMALL --data.root {root} --data.shots 4"
    if "OTHER" in command:
        other = tmp_path_factory.mktemp("other")
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"] = write_clip(other / "clip", seed=1)
        (other / "config.yaml").write_text(yaml.safe_dump(config))
        (other / "adapter").symlink_to(run / "adapter")
        command = command.replace("OTHER", str(other))
    arguments = command.replace("SMALL", small).split()
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("vlkr: error: ")
    assert message in line
    assert len(captured.err.strip().splitlines()) == 1
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", ["adapt --model SMALL --data.name digits", "export --run RUN"])
@pytest.mark.parametrize("forbidden", [True, False])
def test_output_that_cannot_be_written(
    command, forbidden, small, run, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    output = tmp_path / ("folder" if forbidden else "file/inside")
    if forbidden:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    arguments = command.replace("SMALL", small).replace("RUN", str(run)).split()
    assert main([*arguments, "--output", str(output)]) == 2
    assert f"vlkr: error: cannot write {output}: " in capsys.readouterr().err
    assert set(tree(tmp_path)) == {"file"}


def test_existing_output_is_kept(small, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = ["adapt", "--model", small, "--data.name", "digits"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "exists already; name another folder, or --resume goes on" in capsys.readouterr().err
    assert tree(tmp_path) == {"out": None, "out/mine.txt": b"mine"}


# Right input, by the whole road


def test_run_repeats_from_its_own_configuration(run, tmp_path, capsys):
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
        f" --trainer.progress false --output {tmp_path / 'run'}"
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
        f"--trainer.epochs 1 --trainer.progress false --output {tmp_path / 'run'}"
    )
    assert main(command.split()) == 0
    first, second = capsys.readouterr().err.split("\n")[:2]
    assert first == "vlkr: warning: no class has 2 images to train on: taken as 1 shot"
    assert not second.startswith("vlkr: warning")
