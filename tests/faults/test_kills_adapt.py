"""Runs that are killed at random moments end, resumed, as one that nobody disturbed."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest
from helpers import tree

pytestmark = pytest.mark.faults

KILLED = "kill and resume: adapt"
CHECKPOINT = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def adapt(small, colors):
    """The arguments of a run whose dropout and augmentation tell any step that is not repeated."""

    def arguments(output, *more, **changes):
        options = {
            "model": small,
            "data.root": colors,
            "data.shots": 4,
            "data.batch-size": 8,
            "data.min-steps-per-epoch": 6,
            "optimizer.lr": 0.01,
            "trainer.epochs": 4,
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
            "adapter.name": "lora",
            "adapter.options": "{rank: 2, dropout: 0.3}",
            "output": output,
        } | changes
        return ["adapt", *(f"--{key}={value}" for key, value in options.items()), *more]

    return arguments


def result(run):
    """What a run leaves behind, without what time it took."""
    metrics = json.loads((run / "metrics.json").read_text())
    metrics.pop("train_seconds")
    names = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "report.md")
    return metrics, [(run / name).read_bytes() for name in names]


def leftovers(run):
    return list(run.rglob(".*"))


def continue_option(run):
    """The option that continues a run, as the message says."""
    return "--resume" if (run / CHECKPOINT).is_file() else "--force"


@pytest.fixture(scope="module")
def unbroken(adapt, server, tmp_path_factory):
    """An unbroken run's result, and the seconds that a run takes."""
    folder = tmp_path_factory.mktemp("unbroken")
    for name in ("warm", "run"):
        ended = server.run(adapt(folder / name), folder / "stderr")
        assert ended.code == 0, ended.stderr
    assert result(folder / "warm") == result(folder / "run")
    return result(folder / "run"), ended.seconds


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_random_moments(adapt, server, unbroken, tmp_path, case, is_long, number):
    whole, seconds = unbroken
    moments = random.Random(int(number))
    for i in range(20 if is_long else 2):
        run, stderr = tmp_path / f"run{i}", tmp_path / f"stderr{i}"
        with case(KILLED):
            option = None
            for _ in range(2):  # a resumed run is killed as well
                moment = moments.uniform(0, seconds)
                arguments = adapt(run, *([option] if option else []))
                ended = server.kill_after(moment, number, arguments, stderr)
                if ended.code == 0:
                    break
                if number == signal.SIGKILL:
                    assert ended.code == -number
                else:
                    assert ended.code == 130, ended.stderr
                    assert ended.seconds < 10
                    (line,) = ended.stderr.strip().splitlines()
                    assert line.startswith("vlkr: interrupted")
                    if line != "vlkr: interrupted":  # interrupted before anything is changed
                        assert continue_option(run) in line or "nothing was written" in line
                option = continue_option(run)
            if ended.code != 0:
                ended = server.run(adapt(run, *([option] if option else [])), stderr)
                assert ended.code == 0, ended.stderr
            assert result(run) == whole
            assert not leftovers(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_in_the_first_epoch_it_is_resumed_from_there(
    adapt, server, tmp_path, case, number
):
    long_epoch = {"data.min-steps-per-epoch": 10_000, "trainer.epochs": 1}
    with case("interruption within an epoch: adapt"):
        process = server.start(adapt(tmp_path / "run", **long_epoch), tmp_path / "stderr")
        wait_for(lambda: any((tmp_path / "run" / "logs").rglob("events*")))
        time.sleep(0.5)
        ended = server.end(process, tmp_path / "stderr", number)
        assert ended.code == 130
        assert ended.seconds < 10
        (line,) = ended.stderr.strip().splitlines()
        assert "last.ckpt holds 0 epochs and" in line
        assert line.endswith("--resume continues from there")


def wait_for(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 120
        time.sleep(0.02)


def test_a_cluster_that_takes_the_job_back_gets_it_on(adapt, server, unbroken, tmp_path, case):
    whole, _ = unbroken
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    slurm = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "adapt",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODELIST": "localhost",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    run, stderr = tmp_path / "run", tmp_path / "stderr"
    with case("SLURM requeue: adapt"):
        process = server.start(adapt(run), stderr, **slurm)
        wait_for((run / CHECKPOINT).is_file)
        ended = server.end(process, stderr, signal.SIGUSR1)
        assert ended.code == 130, ended.stderr
        assert ended.seconds < 10
        assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
        # The scheduler runs the same command again.
        ended = server.run(adapt(run), stderr, **slurm, SLURM_RESTART_COUNT="1")
        assert ended.code == 0, ended.stderr
        assert result(run) == whole
        assert not list(run.rglob("hpc_ckpt*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_real_processes_are_killed(adapt, unbroken, tmp_path, case, number):
    run = tmp_path / "run"

    def start(*more):
        return subprocess.Popen(
            [sys.executable, "-m", "vlkr", *adapt(run, *more)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    with case(KILLED):
        with start() as process:
            wait_for((run / "logs").is_dir)
            process.send_signal(number)
            _, error = process.communicate(timeout=10)
        assert process.returncode == (-number if number == signal.SIGKILL else 130), error
        with start(continue_option(run)) as process:
            _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        assert result(run) == unbroken[0]


def test_a_run_folder_of_another_is_not_touched(adapt, server, unbroken, tmp_path, case):
    """A killed run started again without --resume or --force is refused."""
    run, stderr = tmp_path / "run", tmp_path / "stderr"
    with case(KILLED):
        process = server.start(adapt(run), stderr)
        wait_for((run / CHECKPOINT).is_file)
        server.end(process, stderr, signal.SIGKILL)
        before = tree(run)
        ended = server.run(adapt(run), stderr)
        assert ended.code == 2
        assert "exists already" in ended.stderr
        assert tree(run) == before
