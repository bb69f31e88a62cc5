"""Two gloo processes split the images and report exactly what one process does."""

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
    first, shift, unknown = (load_dataset(root) for root in roots)
    found = evaluate_model(
        RunFolder.open(run).load_model(),
        [first, shift],
        unknown=[unknown],
        keep_predictions=True,
        device="cpu",
        **options,
    )
    details = [(r.confusion, r.predictions.keys, r.predictions.predicted) for r in found.results]
    return json.loads(json.dumps({"json": found.to_json(), "details": details}))


def worker(index, store, run, roots, broken, output):
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of the loaders' workers; mp.spawn changes it
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=2)
    assert (rank(), world_size()) == (index, 2)
    found = [measure(run, roots, options) for options in OPTIONS]
    try:
        measure(run, [broken, *roots[1:]], {})
        error = None
    except VlkrError as raised:
        error = str(raised)
    (output / f"{index}.json").write_text(json.dumps([found, error]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_report_exactly_what_one_does(run, tmp_path):
    first_root = write_images(tmp_path / "first" / "art", 9).parent
    write_images(first_root / "photo", 10)  # an odd number of images in the test split
    shift = write_shards(tmp_path / "shift", per_class=7, shards=3)
    unknown = write_images(tmp_path / "unknown", 6)
    broken = write_images(tmp_path / "broken", 2, splits=["test"])
    (broken / "test" / "red" / "1.png").write_bytes(b"garbage")  # only one process reads it
    roots = [first_root, shift, unknown]
    output = tmp_path / "out"
    output.mkdir()
    mp.spawn(worker, (tmp_path / "store", run, roots, broken, output), nprocs=2)
    first, second = (json.loads((output / f"{i}.json").read_text()) for i in range(2))
    assert first == second
    shared, error = first
    assert "sample 'red/1.png' is not an image" in error
    for options, found in zip(OPTIONS, shared, strict=True):
        assert found == measure(run, roots, options)
    expected = sorted(sample.key for sample in load_dataset(first_root).source("test"))
    assert shared[0]["details"][0][1] == expected
    metrics = shared[0]["json"]["results"][0]["metrics"]
    assert {"ece", "nll", "auroc", "mean_domain_acc1"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["--devices", "torchrun"])
def test_command_starts_processes_or_is_started_by_torchrun(small, colors, tmp_path, launcher):
    arguments = ["-m", "vlkr", "evaluate", "--model", small, "--datasets", str(colors)]
    arguments += ["--device", "cpu", "--json"]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"OMP_NUM_THREADS": "1", "VLKR_CACHE": str(tmp_path / "cache")}

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    if launcher == "--devices":
        found = call(*arguments, "--devices", "2", "--output", str(tmp_path / "out"))
        assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
    else:
        flags = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        found = call("-m", *flags, *arguments)
    assert found == call(*arguments)


def test_a_single_process():
    with processes(1, "cpu") as device:
        assert device == "cpu"
        assert (rank(), world_size()) == (0, 1)
        assert gather("mine") == ["mine"]
        with pytest.raises(VlkrError, match="failed here"):
            gather("mine", VlkrError("failed here"))


@pytest.mark.parametrize(
    ("devices", "device", "message"),
    [(0, "cpu", "number of devices 0 is too small"), (2, "cpu:0", "--device names one: cpu:0")],
)
def test_invalid_devices(devices, device, message):
    with pytest.raises(VlkrError, match=message), processes(devices, device):
        pass
