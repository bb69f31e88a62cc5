import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import small_run, tree, write_images
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.training import recipe
from vlkr.training.module import FewShotModule

FILES = {
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "checkpoints/last.ckpt",
    "config.yaml",
    "logs/csv/metrics.csv",
    "logs/tensorboard/hparams.yaml",
    "metrics.json",
    "report.md",
    "split.jsonl",
}


def adapter_bytes(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def last_checkpoint(run):
    """The checkpoint, which holds tensors and numbers only."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")


def losses(run):
    with (run / "logs" / "csv" / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


@pytest.fixture(scope="module")
def hundred_steps(tmp_path_factory, small, colors):
    output = tmp_path_factory.mktemp("runs") / "run"
    data = DataConfig(root=colors, shots=4, batch_size=8, min_steps_per_epoch=10)
    trainer = TrainerConfig(epochs=10, accelerator="cpu", progress=False)
    return small_run(output, small, colors, data=data, trainer=trainer)


def test_run_folder_is_whole(hundred_steps, small, colors):
    run = hundred_steps.output
    files = {path for path, content in tree(run).items() if content is not None}
    events = {path for path in files if path.startswith("logs/tensorboard/events.out.tfevents")}
    assert files - events == FILES
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"], config["data"]["root"], config["seed"]) == (small, str(colors), 1)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["parameters"] == hundred_steps.parameters
    assert metrics["results"][0]["metrics"] == hundred_steps.evaluation.in_distribution.metrics
    assert "| colors |" in (run / "report.md").read_text()
    (event_file,) = events
    events = EventAccumulator(str(run / event_file)).Reload()
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx(losses(run))
    assert len(events.Scalars("val_acc1")) == 10


def test_trains_the_adapters_and_nothing_else(hundred_steps, small):
    loss = losses(hundred_steps.output)
    assert len(loss) == 100
    assert sum(loss[-10:]) < 0.5 * sum(loss[:10])
    assert hundred_steps.evaluation.in_distribution.metrics["acc1"] > 0.9
    on_disk = load_file(Path(small.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    state = hundred_steps.bundle.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in on_disk.items())
    adapters = {key for key in state if ".adapters." in key}
    assert not {key for key in set(state) - adapters - set(on_disk) if "mask" not in key}
    assert sum(state[key].numel() for key in adapters) == hundred_steps.parameters
    checkpoint = last_checkpoint(hundred_steps.output)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (9, 100)
    assert all(".adapters." in key for key in checkpoint["state_dict"])
    numbers = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert numbers == hundred_steps.parameters


def test_the_seed_decides_everything_and_workers_and_relative_paths_nothing(
    tmp_path, small, colors, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("clip").symlink_to(small.removeprefix("local-dir:"))
    Path("images").symlink_to(colors)
    data = DataConfig(
        root=Path("images"), shots=4, batch_size=8, min_steps_per_epoch=3, num_workers=2
    )
    first = small_run(tmp_path / "first", small, colors).output
    same = small_run(Path("same"), "clip", colors, data=data).output
    different = small_run(tmp_path / "different", small, colors, seed=2).output
    assert adapter_bytes(same) == adapter_bytes(first) != adapter_bytes(different)
    assert losses(same) == losses(first)
    config = yaml.safe_load(Path("same/config.yaml").read_text())
    assert (config["model"], config["data"]["root"]) == (small, str(colors))


@pytest.mark.parametrize(
    ("towers", "prefixes", "precision"),
    [
        (["visual"], {"visual"}, "32-true"),
        (["text"], {"transformer"}, "32-true"),
        (["visual", "text"], {"visual", "transformer"}, "bf16-mixed"),
    ],
)
def test_towers_and_precisions(tmp_path, small, colors, towers, prefixes, precision):
    trainer = TrainerConfig(epochs=3, precision=precision, accelerator="cpu", progress=False)
    adapter = AdapterConfig("lora", towers=towers)
    result = small_run(tmp_path / "run", small, colors, adapter=adapter, trainer=trainer)
    config = json.loads((result.output / "adapter" / "adapter_config.json").read_text())
    assert {module["module"].split(".")[0] for module in config["modules"]} == prefixes
    trained = load_file(result.output / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in trained.items() if "lora_B" in key)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert {p.dtype for p in result.bundle.model.parameters()} == {torch.float32}
    loss = losses(result.output)
    assert sum(loss[-3:]) < sum(loss[:3])


def test_matches_a_budget_accumulates_gradients_and_needs_no_validation_images(tmp_path, small):
    root = write_images(tmp_path / "d", per_class=2, splits=("train", "test"))
    options = {
        "data": DataConfig(root=root, shots=2, batch_size=8, min_steps_per_epoch=3),
        "trainer": TrainerConfig(
            epochs=2, accumulate_grad_batches=3, accelerator="cpu", progress=False
        ),
    }
    kradapter = small_run(tmp_path / "a", small, root, **options)
    adapter = AdapterConfig("lora", match="kradapter")
    lora = small_run(tmp_path / "b", small, root, adapter=adapter, **options)
    config = yaml.safe_load((lora.output / "config.yaml").read_text())["adapter"]
    assert config["match"] is None
    # The parameter count is linear in the rank; the nearest rank is at most half a rank away.
    step = lora.parameters / config["options"]["rank"]
    assert abs(lora.parameters - kradapter.parameters) <= step / 2
    checkpoint = last_checkpoint(lora.output)
    assert checkpoint["global_step"] == 2
    assert checkpoint["lr_schedulers"][0]["_last_lr"] == [0]


def test_force_leaves_nothing_of_the_run_before(tmp_path, small, colors):
    adapter = AdapterConfig("lora", towers=["visual"])
    run = small_run(tmp_path / "run", small, colors, adapter=adapter).output
    (run / "notes.txt").write_text("mine")
    with pytest.raises(VlkrError, match="exists already; name another folder, or --resume"):
        small_run(run, small, colors)
    small_run(run, small, colors, force=True)
    files = {path for path, content in tree(run).items() if content is not None}
    assert {path for path in files if "tfevents" not in path} == FILES | {"notes.txt"}
    assert len([path for path in files if "tfevents" in path]) == 1
    alone = small_run(tmp_path / "alone", small, colors).output
    assert adapter_bytes(run) == adapter_bytes(alone)
    assert not [key for key in last_checkpoint(run)["state_dict"] if "lora" in key]


def test_interrupted_force_is_not_a_finished_run(tmp_path, small, colors, monkeypatch):
    run = small_run(tmp_path / "run", small, colors).output

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(FewShotModule, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt, match="no epoch was completed; start over with --force"):
        small_run(run, small, colors, force=True, seed=2)
    left = {path for path in tree(run) if path.split("/")[0] in ("adapter", "metrics.json")}
    assert left == set()


def test_diverging_training_is_reported(tmp_path, small, colors):
    optimizer = OptimizerConfig(lr=1e30)
    with pytest.raises(VlkrError, match=r"the loss is nan at step 1 .*lower optimizer\.lr"):
        small_run(tmp_path / "a", small, colors, optimizer=optimizer)
    assert not (tmp_path / "a" / "adapter").exists()
    data = DataConfig(root=colors, shots=4, batch_size=8, min_steps_per_epoch=1)
    trainer = TrainerConfig(epochs=1, accumulate_grad_batches=2, accelerator="cpu", progress=False)
    with pytest.raises(VlkrError, match="are not finite: its training diverged"):
        small_run(tmp_path / "b", small, colors, optimizer=optimizer, data=data, trainer=trainer)
    assert not (tmp_path / "b" / "metrics.json").exists()


def test_adapter_that_the_model_does_not_use_is_reported(tmp_path, small, colors, monkeypatch):
    def load_with_spare_layer(*names):
        bundle = load_model(*names)
        bundle.model.spare = nn.Linear(4, 4)
        return bundle

    load_model = recipe.load_model
    monkeypatch.setattr(recipe, "load_model", load_with_spare_layer)
    adapter = AdapterConfig(targets=["q", "spare"])
    with pytest.raises(VlkrError, match="does not use the adapter on spare"):
        small_run(tmp_path / "run", small, colors, adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": AdapterConfig("krdapter")}, "unknown adapter 'krdapter'; did you mean"),
        ({"adapter": AdapterConfig(options={"rank": 2})}, "has no option 'rank'"),
        ({"adapter": AdapterConfig(targets=["zz"])}, "target 'zz' matches nothing"),
        ({"adapter": AdapterConfig(towers=["vision"])}, "unknown tower 'vision'"),
        ({"adapter": AdapterConfig(blocks=[7])}, "block 7 is out of range"),
        ({"adapter": AdapterConfig("lora", match="zz")}, "unknown adapter 'zz'"),
        ({"optimizer": OptimizerConfig(lr=float("nan"))}, r"optimizer\.lr is nan: it should be"),
        ({"optimizer": OptimizerConfig(lr=0)}, r"optimizer\.lr is 0: .* greater than 0"),
        ({"optimizer": OptimizerConfig(weight_decay=-1)}, "weight_decay is -1: "),
        ({"optimizer": OptimizerConfig(warmup_steps=-1)}, "warmup_steps is -1: "),
        ({"optimizer": OptimizerConfig(grad_clip=float("nan"))}, "grad_clip is nan: "),
        ({"trainer": TrainerConfig(epochs=0)}, r"trainer\.epochs is 0: "),
        ({"trainer": TrainerConfig(accumulate_grad_batches=0)}, "grad_batches is 0: "),
        ({"trainer": TrainerConfig(accelerator="abacus")}, "'abacus' .*is not possible here"),
        (
            {"trainer": TrainerConfig(accelerator="cpu", precision="16-mixed")},
            "'16-mixed' is not possible on this device, try 'bf16-mixed'",
        ),
        ({"seed": 2**32}, "seed 4294967296 is out of range"),
        ({"resume": True}, "nothing to resume"),
        ({"pretrained": "openai"}, "brings its weights"),
    ],
)
def test_invalid_options_write_nothing(tmp_path, small, colors, changes, message):
    with pytest.raises(VlkrError, match=message):
        small_run(tmp_path / "run", small, colors, **changes)
    assert tree(tmp_path) == {}


def test_test_split_without_images_is_reported_before_training(tmp_path, small):
    root = write_images(tmp_path / "d", per_class=1, splits=("train", "test"))
    for name in ("blue", "green", "red"):
        (root / "test" / name / "0.png").unlink()
    data = DataConfig(root=root, shots=1)
    with pytest.raises(VlkrError, match="class 'blue' is empty"):
        small_run(tmp_path / "run", small, root, data=data)
    assert not (tmp_path / "run").exists()
