"""Every configuration that ships runs as its first line says, with fewer steps."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, small_run, write_clip, write_images

from vlkr.cli import COMMANDS, main

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml"))
# What makes a command short, where it has such options.
SHORTER = {
    "approximate": ["--out-features=144", "--in-features=110", "--iterations=3", "--seeds=1"],
    "dg": ["--dry-run"],
    "compare": ["--dry-run"],
    "transfer": ["--dry-run"],
    "adapt": ["--trainer.epochs=1", "--data.min-steps-per-epoch=1", "--trainer.progress=false"],
}


def command_of(config):
    """The arguments of the command in the first line, and the lines that say what it prints."""
    first, *rest = (ROOT / config).read_text(encoding="utf-8").splitlines()
    assert first.startswith("# vlkr "), f"{config} does not open with its command"
    assert rest[0].startswith("# "), f"{config} does not say what its command prints"
    return shlex.split(first.removeprefix("# vlkr ")), rest[0]


def test_there_are_configurations():
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS)
def test_command_names_its_own_file(config):
    arguments, _ = command_of(config)
    assert arguments[0] in COMMANDS
    assert arguments[arguments.index("--config") + 1] == config
    assert isinstance(yaml.safe_load((ROOT / config).read_text()), dict)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, for configurations of commands that read one."""
    folder = tmp_path_factory.mktemp("run")
    model = write_clip(folder / "clip")
    return small_run(folder / "run", model, write_images(folder / "colors")).output


@pytest.mark.parametrize("config", CONFIGS)
def test_command_runs(config, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, _ = command_of(config)
    if "--run" in arguments:
        arguments[arguments.index("--run") + 1] = str(run)
    assert main(arguments + SHORTER.get(arguments[0], [])) == 0, capsys.readouterr().err
    if "--output" in arguments and "--dry-run" not in SHORTER.get(arguments[0], []):
        assert (tmp_path / arguments[arguments.index("--output") + 1]).is_dir()
    assert capsys.readouterr().out


# Steps as the papers tell: CLIP-LoRA 500 x shots, DomainBed 5,000; 10 epochs in batches of 128, of
# at least 10 steps, with ImageNet's 16,000 images the most.
PAPERS = {
    "clip_lora": "500 to 8,000",
    "domainbed": "5,000",
    "imagenet_shift": "1,250",
    "kradapter": "100 to 1,250",
}


@pytest.mark.parametrize("config", sorted(str(path) for path in ROOT.glob("configs/papers/*")))
def test_plan_of_a_papers_protocol(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = Path(config).read_text(encoding="utf-8")
    assert re.search("^# Source: .*(arXiv|ICML)", text, re.MULTILINE)
    assert "\n# Expected: " in text
    assert main([*command_of(config)[0], "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    trained = [row for row in plan["plan"] if row["method"] != "zero-shot"]
    assert {row["steps a cell"] for row in trained} == {PAPERS[Path(config).stem]}
    assert all(re.match(r"[\d,]+$", row["parameters"]) for row in trained)


@pytest.mark.slow
@pytest.mark.parametrize("config", [c for c in CONFIGS if re.search(r"\d %", command_of(c)[1])])
def test_command_prints_the_accuracy_it_promises(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, promise = command_of(config)
    expected = float(re.search(r"(\d+(?:\.\d+)?) %", promise)[1])
    assert main([*arguments, "--trainer.progress=false"]) == 0
    home = re.search(r"│ +\d+ │ +(\d+\.\d) │", capsys.readouterr().out)
    assert float(home[1]) == pytest.approx(expected, abs=1.5)
