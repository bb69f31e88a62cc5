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


def modules(run):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    return [module["module"] for module in config["modules"]]


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


def test_loss_falls_and_the_classes_are_learnt(hundred_steps):
    found = losses(hundred_steps.output)
    assert len(found) == 100
    assert sum(found[-10:]) < 0.5 * sum(found[:10])
    assert hundred_steps.evaluation.in_distribution.metrics["acc1"] > 0.9


def test_base_weights_are_bit_identical_after_100_steps(hundred_steps, small):
    on_disk = load_file(Path(small.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    state = hundred_steps.bundle.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in on_disk.items())
    adapters = {key for key in state if ".adapters." in key}
    assert not {key for key in set(state) - adapters - set(on_disk) if "mask" not in key}
    assert sum(state[key].numel() for key in adapters) == hundred_steps.parameters


def test_checkpoint_holds_adapters_only_and_no_pickled_objects(hundred_steps):
    checkpoint = torch.load(
        hundred_steps.output / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu"
    )
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (9, 100)
    assert all(".adapters." in key for key in checkpoint["state_dict"])
    numbers = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert numbers == hundred_steps.parameters


def test_seed_decides_everything(tmp_path, small, colors):
    runs = [
        small_run(tmp_path / name, small, colors, seed=seed).output
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = map(adapter_bytes, runs)
    assert a == b
    assert a != c
    assert losses(runs[0]) == losses(runs[1])


def test_workers_change_nothing(tmp_path, small, colors):
    def run(name, workers):
        data = DataConfig(
            root=colors, shots=4, batch_size=8, min_steps_per_epoch=3, num_workers=workers
        )
        return adapter_bytes(small_run(tmp_path / name, small, colors, data=data).output)

    assert run("a", 0) == run("b", 2)


@pytest.mark.parametrize(
    ("towers", "prefixes"),
    [
        (["visual"], {"visual"}),
        (["text"], {"transformer"}),
        (["visual", "text"], {"visual", "transformer"}),
    ],
)
def test_towers(tmp_path, small, colors, towers, prefixes):
    result = small_run(
        tmp_path / "run", small, colors, adapter=AdapterConfig("lora", towers=towers)
    )
    assert {module.split(".")[0] for module in modules(result.output)} == prefixes
    trained = load_file(result.output / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in trained.items() if "lora_B" in key)
    found = losses(result.output)
    assert found[-1] < found[0]


def test_bf16_mixed_trains_fp32_adapters(tmp_path, small, colors):
    trainer = TrainerConfig(epochs=5, precision="bf16-mixed", accelerator="cpu", progress=False)
    result = small_run(tmp_path / "run", small, colors, trainer=trainer)
    tensors = load_file(result.output / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    found = losses(result.output)
    assert sum(found[-3:]) < sum(found[:3])
    assert {p.dtype for p in result.bundle.model.parameters()} == {torch.float32}


def test_budget_is_matched_and_the_size_kept(tmp_path, small, colors):
    kradapter = small_run(tmp_path / "a", small, colors)
    lora = small_run(
        tmp_path / "b", small, colors, adapter=AdapterConfig("lora", match="kradapter")
    )
    config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert config["adapter"]["match"] is None
    rank = config["adapter"]["options"]["rank"]
    # Of all ranks it is the one that comes nearest: a rank more or less is farther off.
    step = lora.parameters / rank
    assert abs(lora.parameters - kradapter.parameters) <= step / 2


def test_training_without_validation_images(tmp_path, small):
    root = write_images(tmp_path / "d", per_class=2, splits=("train", "test"))
    data = DataConfig(root=root, shots=2, batch_size=8, min_steps_per_epoch=3)
    run = small_run(tmp_path / "run", small, root, data=data).output
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert len(losses(run)) == 6


def test_gradients_are_accumulated(tmp_path, small, colors):
    trainer = TrainerConfig(epochs=2, accumulate_grad_batches=3, accelerator="cpu", progress=False)
    run = small_run(tmp_path / "run", small, colors, trainer=trainer).output
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
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
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if "lora" in key]


def test_interrupted_force_is_no_finished_run(tmp_path, small, colors, monkeypatch):
    run = small_run(tmp_path / "run", small, colors).output

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(FewShotModule, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt, match="start again with --force"):
        small_run(run, small, colors, force=True, seed=2)
    left = {path for path in tree(run) if path.split("/")[0] in ("adapter", "metrics.json")}
    assert left == set()


def test_relative_paths_are_made_absolute(tmp_path, small, colors, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip").symlink_to(small.removeprefix("local-dir:"))
    Path("images").symlink_to(colors)
    data = DataConfig(root=Path("images"), shots=4, batch_size=8, min_steps_per_epoch=3)
    small_run(Path("run"), "clip", colors, data=data)
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["model"] == small
    assert config["data"]["root"] == str(colors)


def test_diverging_training_is_told(tmp_path, small, colors):
    optimizer = OptimizerConfig(lr=1e30)
    with pytest.raises(VlkrError, match=r"the loss is nan at step 1 .*lower optimizer\.lr"):
        small_run(tmp_path / "a", small, colors, optimizer=optimizer)
    assert not (tmp_path / "a" / "adapter").exists()
    data = DataConfig(root=colors, shots=4, batch_size=8, min_steps_per_epoch=1)
    trainer = TrainerConfig(epochs=1, accumulate_grad_batches=2, accelerator="cpu", progress=False)
    with pytest.raises(VlkrError, match="are not finite: its training diverged"):
        small_run(tmp_path / "b", small, colors, optimizer=optimizer, data=data, trainer=trainer)
    assert not (tmp_path / "b" / "metrics.json").exists()


def test_adapter_that_the_model_does_not_use_is_told(tmp_path, small, colors, monkeypatch):
    def load_with_spare_part(*names):
        bundle = load_model(*names)
        bundle.model.spare = nn.Linear(4, 4)
        return bundle

    load_model = recipe.load_model
    monkeypatch.setattr(recipe, "load_model", load_with_spare_part)
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
        ({"optimizer": OptimizerConfig(lr=float("nan"))}, r"optimizer\.lr is nan: .* less than"),
        ({"optimizer": OptimizerConfig(lr=0)}, r"optimizer\.lr is 0: .* greater than 0"),
        ({"optimizer": OptimizerConfig(lr=float("inf"))}, r"optimizer\.lr is inf: .* less than"),
        ({"optimizer": OptimizerConfig(weight_decay=-1)}, "weight_decay is -1: "),
        ({"optimizer": OptimizerConfig(weight_decay=float("nan"))}, "weight_decay is nan: "),
        ({"optimizer": OptimizerConfig(warmup_steps=-1)}, "warmup_steps is -1: "),
        ({"optimizer": OptimizerConfig(grad_clip=float("nan"))}, "grad_clip is nan: "),
        ({"trainer": TrainerConfig(epochs=0)}, r"trainer\.epochs is 0: "),
        ({"trainer": TrainerConfig(accumulate_grad_batches=0)}, "grad_batches is 0: "),
        ({"trainer": TrainerConfig(accelerator="abacus")}, "'abacus' .*is not possible here"),
        (
            {"trainer": TrainerConfig(accelerator="cpu", precision="16-mixed")},
            "'16-mixed' is not possible on this device, try 'bf16-mixed'",
        ),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**32}, "seed 4294967296 is out of range"),
        ({"resume": True}, "nothing to resume"),
        ({"pretrained": "openai"}, "brings its weights"),
    ],
)
def test_wrong_options_write_nothing(tmp_path, small, colors, changes, message):
    with pytest.raises(VlkrError, match=message):
        small_run(tmp_path / "run", small, colors, **changes)
    assert tree(tmp_path) == {}


def test_test_split_without_images_is_told_before_training(tmp_path, small):
    root = write_images(tmp_path / "d", per_class=1, splits=("train", "test"))
    for name in ("blue", "green", "red"):
        (root / "test" / name / "0.png").unlink()
    data = DataConfig(root=root, shots=1)
    with pytest.raises(VlkrError, match="class 'blue' is empty"):
        small_run(tmp_path / "run", small, root, data=data)
    assert not (tmp_path / "run").exists()
