"""Wrong input is one line on stderr, exit status 2, and nothing is written."""

import os
from pathlib import Path

import pytest
import yaml
from helpers import small_run, tree, write_clip, write_images, write_shards, write_tar

from vlkr.cli import main


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def run(tmp_path_factory, small):
    colors = write_images(tmp_path_factory.mktemp("data") / "colors")
    return small_run(tmp_path_factory.mktemp("runs") / "run", small, colors).output


def refused(arguments, capsys):
    """The one line that a command prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("vlkr: error: ")
    return line.removeprefix("vlkr: error: ")


# The parser's: command, and how its line ends or what is in it

EVALUATE, ADAPT = "evaluate --model tiny", "adapt --output x"
OPTIONS = [
    ("frobnicate", "unknown command 'frobnicate' (known: demo, adapt"),
    ("data pakc --help", "unknown command 'data pakc'; did you mean data pack? (known: data pack"),
    ("adapt", "--output requires an argument"),
    ("adapt --output", "--output requires an argument"),
    (f"{ADAPT} y", "unexpected argument 'y'"),
    (f"{EVALUATE} --cache false", "unexpected argument 'false'"),
    ("data info a b", "unexpected argument 'b'"),
    ("data info", "--source requires an argument"),
    ("predict a b", "--model requires an argument"),
    (f"{EVALUATE} --batch-sise 1", "unknown option --batch-sise; did you mean --batch-size?"),
    (f"{EVALUATE} --outp y", "unknown option --outp; did you mean --output?"),
    (f"{EVALUATE} --batch-size two", 'value for --batch-size: unable to convert "two" into int'),
    (f"{EVALUATE} --cache=maybe", 'value for --cache: unable to convert "maybe" into bool'),
    (f"{EVALUATE} --split a --split b", "--split specified multiple times"),
    (f"{ADAPT} --lr 1", "unknown option --lr; did you mean --optimizer.lr?"),
    (f"{ADAPT} --adapter.blocks a", 'value for --adapter.blocks: unable to convert "a" into int'),
    (f"{ADAPT} --data.crop-scale 1", "--data.crop-scale requires 2 positional arguments"),
    (f"{ADAPT} --data.classes some", 'Choose from: "all", "base", "new"'),
    (f"{ADAPT} --config", "--config requires an argument"),
    (f"{ADAPT} --config nowhere.yaml", "no config file 'nowhere.yaml'"),
    (f"{ADAPT} --config configs/zz.yaml", "no config file 'configs/zz.yaml'"),
]


@pytest.mark.parametrize(("command", "message"), OPTIONS)
def test_options(command, message, capsys):
    assert message in refused(command.split(), capsys)


CONFIGURATIONS = [
    ("seed: [1\nlr: }", "c.yaml is not valid YAML"),
    ("\tseed: 1", "c.yaml is not valid YAML"),
    ("", "c.yaml holds nothing, expected a mapping"),
    ("- a\n- b", "c.yaml holds a list, expected a mapping"),
    ("sed: 1", "c.yaml; did you mean seed?"),
    ("seed: two", 'unable to convert "two" into int'),
    ("seed: [1, 2]", "seed"),
    ("adapter:\n  nme: lora", "unknown option 'adapter.nme' in "),
    ("adapter:\n  nme: lora", "; did you mean adapter.name?"),
    ("data:\n  batch_sise: 1", "; did you mean data.batch_size?"),
    ("data: digits", "unknown option 'data' in "),
    ("data:\n  classes: some", "data.classes from "),
    ("config: other.yaml", "names another config; give each with an option of its own"),
]


@pytest.mark.parametrize(("content", "message"), CONFIGURATIONS)
def test_configurations(content, message, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    assert message in refused([*ADAPT.split(), "--config", str(tmp_path / "c.yaml")], capsys)


# The commands': checked before anything is computed

SMALL, DIGITS = "adapt --model SMALL", "adapt --model SMALL --data.name digits"
COMMANDS = [
    ("adapt --model ViT-B-33 --data.name digits", "unknown model 'ViT-B-33'; did you mean"),
    ("adapt --model ViT-B-32 --data.name digits", "needs its weights named by --pretrained"),
    (
        "adapt --model ViT-B-32 --pretrained openia --data.name digits",
        "pretrained 'openia' is neither a file nor a tag of ViT-B-32",
    ),
    (f"{DIGITS} --adapter.name lra", "unknown adapter 'lra'"),
    (f"{DIGITS} --adapter.options.rank 8", "adapter 'kradapter' has no option 'rank'"),
    (f"{SMALL} --data.name digts", "no dataset 'digts'"),
    (SMALL, "no dataset: give --data.name CARD or --data.root FOLDER"),
    (f"{SMALL} --data.root /nowhere", "no folder at data root /nowhere"),
    (f"{DIGITS} --adapter.targets zz", "target 'zz' matches no"),
    (f"{DIGITS} --adapter.towers zz", "unknown tower 'zz'"),
    (f"{DIGITS} --data.shots 0", "data.shots "),
    (f"{DIGITS} --optimizer.lr nan", "optimizer.lr is nan"),
    (f"{DIGITS} --optimizer.lr inf", "optimizer.lr is inf"),
    (f"{DIGITS} --trainer.epochs 0", "trainer.epochs is 0: it should be greater"),
    (f"{DIGITS} --seed -1", "seed "),
    (f"{DIGITS} --resume", "nothing to resume"),
    (f"{DIGITS} --trainer.accelerator abacus", "trainer.accelerator 'abacus'"),
    ("evaluate --model SMALL --device abacus", "device 'abacus' is not available"),
    ("evaluate --run /nowhere", "no run folder at /nowhere"),
    ("export --run /nowhere", "no run folder at /nowhere"),
    ("export --run OTHER", "was made for a different base"),
]


def other_base(run, folder):
    """A run whose adapter was trained on other base weights."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] = write_clip(folder / "clip", seed=1)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "adapter").symlink_to(run / "adapter")
    return str(folder)


@pytest.mark.parametrize(("command", "message"), COMMANDS)
def test_commands(command, message, small, run, tmp_path, tmp_path_factory, capsys):
    if "OTHER" in command:
        command = command.replace("OTHER", other_base(run, tmp_path_factory.mktemp("other")))
    arguments = command.replace("SMALL", small).split()
    assert message in refused([*arguments, "--output", str(tmp_path / "out")], capsys)
    assert tree(tmp_path) == {}


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


DATA = [
    (corrupt_image, "is not an image in a known format"),
    (empty_class, "class 'red' is empty"),
    (truncated_tar, "1.tar: unexpected end of data"),
    (missing_shard, "1.tar is missing"),
    (label_out_of_range, "label 3, expected below 3"),
]


@pytest.mark.parametrize(("make", "message"), DATA)
def test_data(make, message, small, tmp_path, tmp_path_factory, capsys):
    root = make(tmp_path_factory.mktemp("data") / "d")
    arguments = ["adapt", "--model", small, "--data.root", str(root), "--data.shots", "4"]
    assert message in refused([*arguments, "--output", str(tmp_path / "out")], capsys)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", [DIGITS, "export --run RUN"])
@pytest.mark.parametrize("forbidden", [True, False])
def test_outputs_that_cannot_be_written(
    command, forbidden, small, run, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    output = tmp_path / ("folder" if forbidden else "file/inside")
    if forbidden:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    arguments = command.replace("SMALL", small).replace("RUN", str(run)).split()
    assert f"cannot write {output}: " in refused([*arguments, "--output", str(output)], capsys)
    assert set(tree(tmp_path)) == {"file"}


def test_existing_outputs_are_kept(small, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    arguments = [*DIGITS.replace("SMALL", small).split(), "--output", str(out)]
    message = "exists already; name another folder, or --resume "
    assert message in refused(arguments, capsys)
    assert tree(tmp_path) == {"out": None, "out/mine.txt": b"mine"}
    assert Path(out).is_dir()
