"""Packing, exporting and comparing, killed at random moments, end as if nobody had disturbed."""

import json
import random
import signal

import pytest
from helpers import small_run, tree, write_images

pytestmark = pytest.mark.faults

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
MOST = 10
"""Kills in a row that a command is to get over."""


def killed_until_done(server, arguments, folder, number, moments, seconds):
    """Gives the same command again and again, and kills it each time but the last."""
    for i in range(MOST):
        stderr = folder / "stderr"
        if i == MOST - 1 or (i and moments.random() < 0.4):
            ended = server.run(arguments, stderr)
        else:
            ended = server.kill_after(moments.uniform(0, seconds), number, arguments, stderr)
        if ended.code == 0:
            return
        if i and ended.code == 2:  # it was killed behind its last step
            assert "exists already" in ended.stderr
            return
        if number == signal.SIGKILL:
            assert ended.code == -number, ended.stderr
        else:
            assert ended.code == 130, ended.stderr
            assert ended.seconds < 10
            line = ended.stderr.strip().splitlines()[-1]
            assert line.startswith("vlkr: interrupted")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "colors", per_class=60)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pack(server, images, tmp_path, case, is_long, number, workers):
    def arguments(output):
        return [
            "data",
            "pack",
            images,
            output,
            "--samples-per-shard=4",
            f"--num-workers={workers}",
        ]

    ended = server.run(arguments(tmp_path / "whole"), tmp_path / "stderr")
    assert ended.code == 0, ended.stderr
    whole = tree(tmp_path / "whole")
    moments = random.Random(int(number) + workers)
    for i in range(20 if is_long else 2):
        with case("kill and resume: data pack"):
            run = tmp_path / f"run{i}"
            killed_until_done(server, arguments(run), tmp_path, number, moments, ended.seconds)
            assert tree(run) == whole


@pytest.fixture(scope="module")
def run(small, colors, tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "run", small, colors).output


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("exists", [False, True])
def test_export(server, run, tmp_path, case, is_long, number, exists):
    stderr = tmp_path / "stderr"

    def arguments(output, alpha):
        return ["export", f"--run={run}", f"--output={output}", f"--alpha={alpha}", "--force"]

    for name, alpha in (("old", 0.5), ("whole", 1)):
        ended = server.run(arguments(tmp_path / name / "out", alpha), stderr)
        assert ended.code == 0, ended.stderr
    old, whole = (tree(tmp_path / name / "out") for name in ("old", "whole"))
    moments = random.Random(int(number) + exists)
    for i in range(20 if is_long else 1):
        folder = tmp_path / f"place{i}"
        folder.mkdir()
        with case("kill and resume: export"):
            if exists:
                (tmp_path / "old" / "out").rename(folder / "out")
            moment = moments.uniform(0, ended.seconds)
            server.kill_after(moment, number, arguments(folder / "out", 1), stderr)
            # The old export or the new one, whole, or none where there was none.
            left = {p.name for p in folder.iterdir() if p.name[0] != "."}
            assert left == ({"out"} if exists else left & {"out"})
            if left:
                assert tree(folder / "out") in ([old, whole] if exists else [whole])
            ended_again = server.run(arguments(folder / "out", 1), stderr)
            assert ended_again.code == 0, ended_again.stderr
            assert tree(folder / "out") == whole
            assert [p.name for p in folder.iterdir()] == ["out"]
        if exists:
            server.run(arguments(tmp_path / "old" / "out", 0.5), stderr)


def cells(output):
    """Results and adapters of a grid, without what time and memory they took."""
    found = {}
    for path in sorted((output / "cells").rglob("result.json")):
        result = json.loads(path.read_text())
        for key in ("seconds", "train_seconds", "peak_memory_mib"):
            result.pop(key)
        name = path.parent.relative_to(output).as_posix()
        found[name] = result
        for file in ("run/adapter/adapter_model.safetensors", "predictions.safetensors"):
            if (path.parent / file).exists():
                found[f"{name}/{file}"] = (path.parent / file).read_bytes()
    return found


@pytest.fixture(scope="module")
def grids(colors, tmp_path_factory):
    """What each command that makes a grid is told beside the options that all share."""
    root = tmp_path_factory.mktemp("grids")
    more_colors = write_images(root / "more", per_class=16)
    for d, name in enumerate(("one", "three", "two")):
        write_images(root / "domains" / name, per_class=8 + d)
    more = {"seeds": "[1]", "methods": "[zero-shot, kradapter]"}
    return {
        "compare": {
            "data.root": colors,
            "seeds": "[1, 2]",
            "methods": "[zero-shot, kradapter, lora]",
            "shots": "[2]",
        },
        "transfer": {"data.root": colors, "datasets": f"[{more_colors}]", "data.shots": 2, **more},
        "dg": {"data.root": root / "domains", "data.shots": 2, **more},
    }


@pytest.fixture(scope="module")
def grid(server, grids, small, tmp_path_factory):
    """Arguments of a grid by command and folder, and what an unbroken one finds in what time."""
    unbroken = {}

    def arguments(command, output):
        options = {
            "model": small,
            "output": output,
            "data.batch-size": 8,
            "data.min-steps-per-epoch": 3,
            "trainer.epochs": 2,
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        }
        return [command, *(f"--{k}={v}" for k, v in (options | grids[command]).items())]

    def whole(command):
        if command not in unbroken:
            folder = tmp_path_factory.mktemp(command)
            ended = server.run(arguments(command, folder / "out"), folder / "stderr")
            assert ended.code == 0, ended.stderr
            unbroken[command] = cells(folder / "out"), ended.seconds
        return unbroken[command]

    return arguments, whole


GRIDS = [
    *(("compare", number, 1, 7) for number in SIGNALS),
    *((command, number, 1, 5) for command in ("transfer", "dg") for number in SIGNALS[:2]),
]


@pytest.mark.parametrize(("command", "number", "short", "long"), GRIDS)
def test_grids(server, grid, tmp_path, case, is_long, command, number, short, long):
    arguments, unbroken = grid
    whole, seconds = unbroken(command)
    assert sum(name.endswith("adapter_model.safetensors") for name in whole) >= 1
    moments = random.Random(f"{command}{int(number)}")
    for i in range(long if is_long else short):
        with case(f"kill and resume: {command}"):
            output = tmp_path / f"run{i}"
            killed_until_done(
                server, arguments(command, output), tmp_path, number, moments, seconds
            )
            assert cells(output) == whole
            assert (output / "results.csv").is_file()
