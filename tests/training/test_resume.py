import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import small_run

from vlkr.adapters.registry import ADAPTERS
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.training.module import FewShotModule
from vlkr.training.trainer import SealedCheckpoints

TRAINER = TrainerConfig(epochs=4, accelerator="cpu", progress=False)


def adapter_bytes(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def interrupt_at(monkeypatch, step):
    """Ctrl-C within a step, as Python raises it."""
    training_step = FewShotModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == step:
            raise KeyboardInterrupt
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(FewShotModule, "training_step", interrupted)


def logged_steps(path):
    with path.open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig("lora", options={"rank": 2, "dropout": 0.3}),
        AdapterConfig("lora", towers=["visual"], options={"rank": 2, "dropout": 0.3}),
        *map(AdapterConfig, sorted(ADAPTERS)),
    ],
    ids=["lora with dropout", "lora with dropout, visual", *sorted(ADAPTERS)],
)
def test_resumed_run_ends_as_an_unbroken_one(tmp_path, small, colors, monkeypatch, adapter):
    options = {"adapter": adapter, "trainer": TRAINER}
    whole = small_run(tmp_path / "whole", small, colors, **options).output
    run = tmp_path / "broken"
    handler = signal.getsignal(signal.SIGINT)
    # Epochs of 3 steps: in the second, and again in the third, which was begun anew.
    for step, epochs, resume in ((5, 1, False), (8, 2, True)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(
                KeyboardInterrupt, match=f"holds {epochs} epochs?, --resume goes on"
            ):
                small_run(run, small, colors, **options, resume=resume)
        assert signal.getsignal(signal.SIGINT) is handler
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["epoch"] == epochs - 1
        assert not (run / "adapter").exists()
    result = small_run(run, small, colors, **options, resume=True)
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert (run / "report.md").read_bytes() == (whole / "report.md").read_bytes()
    assert result.evaluation.in_distribution.metrics["acc1"] > 0
    logs = run / "logs" / "csv"
    assert logged_steps(logs / "metrics.csv") == list(range(6, 12))
    assert logged_steps(logs / "metrics-2.csv") == [3, 4, 5, 6, 7]
    assert logged_steps(logs / "metrics-1.csv") == [0, 1, 2, 3, 4]


def test_resuming_a_finished_run_repeats_its_result(tmp_path, small, colors):
    run = small_run(tmp_path / "run", small, colors).output
    before = adapter_bytes(run), (run / "report.md").read_bytes()
    small_run(run, small, colors, resume=True)
    assert (adapter_bytes(run), (run / "report.md").read_bytes()) == before


@pytest.fixture(scope="module")
def run(tmp_path_factory, small, colors):
    return small_run(tmp_path_factory.mktemp("runs") / "run", small, colors).output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed is 2 now and was 1 in"),
        ({"optimizer": OptimizerConfig(lr=1e-3)}, r"optimizer\.lr is 0\.001 now and was 0\.01"),
        ({"adapter": AdapterConfig("lora")}, r"adapter\.name is lora now and was kradapter"),
        (
            {"adapter": AdapterConfig(options={"scale": 1.0})},
            r"adapter\.options\.scale is 1\.0 now and was None",
        ),
        ({"trainer": TRAINER}, r"trainer\.epochs is 4 now and was 2"),
        ({"data": DataConfig(name="digits", shots=4, batch_size=8)}, r"data\.name is digits now"),
    ],
)
def test_another_configuration_is_refused(run, small, colors, changes, message):
    before = adapter_bytes(run), (run / "config.yaml").read_bytes()
    with pytest.raises(VlkrError, match=f"cannot resume: .*{message}"):
        small_run(run, small, colors, resume=True, **changes)
    assert (adapter_bytes(run), (run / "config.yaml").read_bytes()) == before


def test_progress_workers_and_device_may_change(run, small, colors, capfd):
    before = adapter_bytes(run)
    data = DataConfig(root=colors, shots=4, batch_size=8, min_steps_per_epoch=3, num_workers=1)
    trainer = TrainerConfig(epochs=2, accelerator="auto", progress=True)
    small_run(run, small, colors, resume=True, data=data, trainer=trainer)
    assert adapter_bytes(run) == before
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("size", [0, 100, -100])
def test_damaged_checkpoint_is_told(tmp_path, small, colors, size):
    run = small_run(tmp_path / "run", small, colors).output
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(VlkrError, match=r"last\.ckpt is damaged"):
        small_run(run, small, colors, resume=True)


def test_missing_configuration_is_told(tmp_path, small, colors):
    run = small_run(tmp_path / "run", small, colors).output
    (run / "config.yaml").unlink()
    with pytest.raises(VlkrError, match=r"cannot read .*config\.yaml"):
        small_run(run, small, colors, resume=True)


def test_checkpoint_of_other_weights_or_adapters_is_refused(run, small, colors):
    checkpoint = run / "checkpoints" / "last.ckpt"
    whole = checkpoint.read_bytes()
    saved = torch.load(checkpoint, weights_only=True)
    try:
        SealedCheckpoints().save_checkpoint(saved | {"base_sha256": "0"}, checkpoint)
        with pytest.raises(VlkrError, match="written for different base weights"):
            small_run(run, small, colors, resume=True)
        SealedCheckpoints().save_checkpoint(saved | {"state_dict": {}}, checkpoint)
        with pytest.raises(VlkrError, match="written for different adapters or targets"):
            small_run(run, small, colors, resume=True)
    finally:
        checkpoint.write_bytes(whole)


def start(output, small, colors, epochs):
    arguments = {
        "model": small,
        "data.root": colors,
        "data.shots": 4,
        "data.batch-size": 8,
        "data.min-steps-per-epoch": 3,
        "optimizer.lr": 0.01,
        "trainer.epochs": epochs,
        "trainer.accelerator": "cpu",
        "trainer.progress": "false",
        "adapter.name": "lora",
        "adapter.options": "{rank: 2, dropout: 0.3}",
        "output": output,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "vlkr", "adapt", *(f"--{k}={v}" for k, v in arguments.items())],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError(f"no {path} after 120 s")


@pytest.mark.slow
def test_killed_process_is_resumed_to_the_same_bytes(tmp_path, small, colors):
    epochs = 40
    run = tmp_path / "run"
    with start(run, small, colors, epochs) as process:
        wait_for(run / "checkpoints" / "last.ckpt", process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    epoch = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"]
    assert 0 <= epoch < epochs - 1
    assert not (run / "adapter").exists()
    options = {
        "adapter": AdapterConfig("lora", options={"rank": 2, "dropout": 0.3}),
        "trainer": TrainerConfig(epochs=epochs, accelerator="cpu", progress=False),
    }
    small_run(run, small, colors, **options, resume=True)
    whole = small_run(tmp_path / "whole", small, colors, **options).output
    assert adapter_bytes(run) == adapter_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_process_ends_soon_and_says_resume_hint(tmp_path, small, colors, number):
    run = tmp_path / "run"
    with start(run, small, colors, 10_000) as process:
        wait_for(run / "checkpoints" / "last.ckpt", process)
        process.send_signal(number)
        sent = time.monotonic()
        _, error = process.communicate(timeout=60)
        assert time.monotonic() - sent < 10
    assert process.returncode == 130
    (line,) = error.strip().splitlines()
    assert line.startswith("vlkr: interrupted: last.ckpt holds")
    assert line.endswith("--resume goes on from there")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert Path(config["data"]["root"]) == colors
    assert not [p for p in run.rglob(".*") if p.name.startswith(".last")]
