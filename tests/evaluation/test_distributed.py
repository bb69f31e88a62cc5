"""Two real gloo processes share the images and report what one process does, to the last digit."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import write_images, write_shards

from vlkr.datasets import load_dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate_model
from vlkr.runs import RunFolder
from vlkr.runtime import gather, processes, rank, world_size

OPTIONS = ({}, {"batch_size": 5}, {"batch_size": 3, "num_workers": 2}, {"cache": True})


def measure(run, roots, options):
    bundle = RunFolder.open(run).load_model()
    home, shift, strange = (load_dataset(root) for root in roots)
    found = evaluate_model(
        bundle,
        [home, shift],
        unknown=[strange],
        keep_predictions=True,
        device="cpu",
        **options,
    )
    said = [r.predictions for r in found.results]
    return {
        "json": found.to_json(),
        "confusion": [r.confusion for r in found.results],
        "keys": [part.keys for part in said],
        "predicted": [part.predicted for part in said],
    }


def worker(index, store, run, roots, broken, output):
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of the loaders' workers; mp.spawn changes it
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=2)
    assert (rank(), world_size()) == (index, 2)
    found = [measure(run, roots, options) for options in OPTIONS]
    try:
        measure(run, [broken, *roots[1:]], {})
        error = None
    except VlkrError as met:
        error = str(met)
    (output / f"{index}.json").write_text(json.dumps([found, error]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_report_what_one_does(run, tmp_path):
    home = write_images(tmp_path / "home" / "art", 9).parent
    write_images(home / "photo", 10)  # an odd number of images in the test split
    shift = write_shards(tmp_path / "shift", per_class=7, shards=3)
    strange = write_images(tmp_path / "strange", 6)
    broken = write_images(tmp_path / "broken", 2, splits=["test"])
    (broken / "test" / "red" / "1.png").write_bytes(b"garbage")  # one process alone meets it
    roots = [home, shift, strange]
    output = tmp_path / "out"
    output.mkdir()
    mp.spawn(worker, (tmp_path / "store", run, roots, broken, output), nprocs=2)
    first, second = (json.loads((output / f"{i}.json").read_text()) for i in range(2))
    assert first == second
    shared, error = first
    assert "sample 'red/1.png' is not an image" in error
    for options, found in zip(OPTIONS, shared, strict=True):
        alone = json.loads(json.dumps(measure(run, roots, options)))
        assert found == alone
    expected = sorted(sample.key for sample in load_dataset(home).source("test"))
    assert shared[0]["keys"][0] == expected
    metrics = shared[0]["json"]["results"][0]["metrics"]
    assert {"ece", "nll", "auroc", "mean_domain_acc1"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [None, "torch.distributed.run"])
def test_command_starts_processes_or_is_started_by_torchrun(small, colors, tmp_path, launcher):
    arguments = ["-m", "vlkr", "evaluate", "--model", small, "--datasets", str(colors)]
    arguments += ["--device", "cpu", "--json"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {"OMP_NUM_THREADS": "1", "VLKR_CACHE": str(tmp_path / "cache")}

    def call(arguments):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    if launcher is None:
        found = call([*arguments, "--devices", "2", "--output", str(tmp_path / "out")])
        assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
    else:
        flags = ["--standalone", "--nproc-per-node", "2"]
        found = call(["-m", launcher, *flags, *arguments])
    assert found == call(arguments)


def test_alone():
    with processes(1, "cpu") as device:
        assert device == "cpu"
        assert (rank(), world_size()) == (0, 1)
        assert gather("mine") == ["mine"]
        with pytest.raises(VlkrError, match="met here"):
            gather("mine", VlkrError("met here"))


@pytest.mark.parametrize(
    ("devices", "device", "message"),
    [(0, "cpu", "number of devices 0 is too small"), (2, "cpu:0", "--device names one: cpu:0")],
)
def test_devices_that_cannot_be(devices, device, message):
    with pytest.raises(VlkrError, match=message), processes(devices, device):
        pass
