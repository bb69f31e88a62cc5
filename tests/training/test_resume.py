import csv
import os
import shutil
import signal

import pytest
import torch
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
                KeyboardInterrupt, match=f"holds {epochs} epochs?; --resume continues"
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


@pytest.fixture(scope="module")
def run(tmp_path_factory, small, colors):
    return small_run(tmp_path_factory.mktemp("runs") / "run", small, colors).output


def test_resuming_a_finished_run_repeats_its_result(run, small, colors, capfd):
    """Also with progress bar, workers and device changed, on which the result does not depend."""
    before = adapter_bytes(run), (run / "report.md").read_bytes()
    data = DataConfig(root=colors, shots=4, batch_size=8, min_steps_per_epoch=3, num_workers=1)
    trainer = TrainerConfig(epochs=2, accelerator="auto", progress=True)
    small_run(run, small, colors, resume=True, data=data, trainer=trainer)
    assert (adapter_bytes(run), (run / "report.md").read_bytes()) == before
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed is 2 now and was 1 in"),
        ({"optimizer": OptimizerConfig(lr=1e-3)}, r"optimizer\.lr is 0\.001 now and was 0\.01"),
        (
            {"adapter": AdapterConfig(options={"scale": 1.0})},
            r"adapter\.options\.scale is 1\.0 now and was None",
        ),
    ],
)
def test_a_different_configuration_is_refused(run, small, colors, changes, message):
    before = adapter_bytes(run), (run / "config.yaml").read_bytes()
    with pytest.raises(VlkrError, match=f"cannot resume: .*{message}"):
        small_run(run, small, colors, resume=True, **changes)
    assert (adapter_bytes(run), (run / "config.yaml").read_bytes()) == before


def resealed(change):
    """Writes a checkpoint anew with changed content, and with its seal."""

    def harm(run):
        path = run / "checkpoints" / "last.ckpt"
        SealedCheckpoints().save_checkpoint(change(torch.load(path, weights_only=True)), path)

    return harm


def rewritten(change):
    def harm(run):
        path = run / "checkpoints" / "last.ckpt"
        path.write_bytes(change(path.read_bytes()))

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (rewritten(lambda content: b""), r"last\.ckpt is damaged: it does not end"),
        (rewritten(lambda content: content[:-100]), r"last\.ckpt is damaged: it does not end"),
        (
            rewritten(lambda content: content[:500] + b"harmed" + content[506:]),
            r"last\.ckpt is damaged: its SHA-256 is",
        ),
        (
            resealed(lambda saved: saved | {"base_sha256": "0"}),
            "written for different base weights",
        ),
        (
            resealed(lambda saved: saved | {"state_dict": {}}),
            "written for different adapters or targets",
        ),
        (resealed(lambda saved: saved | {"loops": {}}), r"last\.ckpt is damaged: KeyError"),
        (lambda run: (run / "config.yaml").unlink(), r"cannot read .*config\.yaml"),
    ],
)
def test_a_damaged_or_different_run_is_refused(run, tmp_path, small, colors, harm, message):
    copy = shutil.copytree(run, tmp_path / "run")
    harm(copy)
    with pytest.raises(VlkrError, match=message):
        small_run(copy, small, colors, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_the_step(tmp_path, small, colors, monkeypatch, number):
    training_step = FewShotModule.training_step

    def signaled(self, batch, batch_idx):
        if self.global_step == 4:
            os.kill(os.getpid(), number)
        return training_step(self, batch, batch_idx)

    options = {"trainer": TRAINER, "adapter": AdapterConfig("lora", options={"dropout": 0.3})}
    run = tmp_path / "run"
    message = r"last\.ckpt holds 1 epoch and 2 batches; --resume continues from there"
    with monkeypatch.context() as patch:
        patch.setattr(FewShotModule, "training_step", signaled)
        with pytest.raises(KeyboardInterrupt, match=message):
            small_run(run, small, colors, **options)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    small_run(run, small, colors, **options, resume=True)
    whole = small_run(tmp_path / "whole", small, colors, **options).output
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert logged_steps(run / "logs" / "csv" / "metrics.csv") == list(range(5, 12))
