"""Two processes from the command line (DDP): one run folder and one process's adapter."""

import json
import subprocess
import sys

import pytest
from helpers import tree
from safetensors.torch import load_file
from torch.testing import assert_close


def adapt(small, colors, output, *options):
    command = [sys.executable, "-m", "vlkr", "adapt", "--model", small, "--data.root", colors]
    command += ["--data.shots", 4, "--data.min-steps-per-epoch", 3, "--trainer.epochs", 2]
    command += ["--trainer.accelerator", "cpu", "--trainer.progress=false", "--seed", 3]
    command += ["--output", output, "--json", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # of one process only


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_joined_batch(small, colors, tmp_path):
    two = adapt(small, colors, tmp_path / "two", "--trainer.devices=2", "--data.batch-size=4")
    one = adapt(small, colors, tmp_path / "one", "--data.batch-size=8")
    weights = "adapter/adapter_model.safetensors"
    found, expected = load_file(tmp_path / "two" / weights), load_file(tmp_path / "one" / weights)
    for key, tensor in expected.items():
        assert_close(found[key], tensor, rtol=1e-2, atol=1e-4)
    assert any(tensor.abs().max() > 1e-3 for key, tensor in expected.items() if key.endswith(".u"))
    assert two["results"][0]["images"] == one["results"][0]["images"]
    assert two["results"][0]["metrics"]["acc1"] == one["results"][0]["metrics"]["acc1"]
    names = [{n for n in tree(tmp_path / run) if "tfevents" not in n} for run in ("two", "one")]
    assert names[0] == names[1]
