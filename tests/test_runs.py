import json
import shutil
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import COLORS, small_run, write_clip, write_images
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import f1_score, recall_score

from vlkr.adapters import adapter_state_dict
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.runs import NEUTRAL, RunConfig, RunFolder, method_labels

# As version 0.1.0 wrote it, for a run of this test's arguments.
CONFIG = """\
model: {model}
pretrained: null
adapter:
  name: kradapter
  targets:
  - q
  - k
  - v
  - out
  - fc1
  - fc2
  towers:
  - visual
  - text
  blocks: null
  options: {{}}
  match: null
data:
  name: null
  root: {root}
  shots: 4
  templates: null
  test_fraction: 0.5
  batch_size: 8
  min_steps_per_epoch: 3
  num_workers: 0
  crop_scale:
  - 0.5
  - 1.0
  flip: true
  classes_per_step: null
  domains: null
  classes: all
  fraction: null
  val_fraction: null
  per_domain: false
  split_file: null
  max_bad: 0
  memory_gb: 4.0
  shuffle_buffer: 1024
  allow_commands: false
optimizer:
  lr: 0.01
  weight_decay: 0.1
  warmup_steps: 0
  grad_clip: 1.0
trainer:
  epochs: 2
  precision: 32-true
  accelerator: cpu
  devices: 1
  num_nodes: 1
  accumulate_grad_batches: 1
  progress: false
seed: 1
"""
METRICS = """model pretrained weights_sha256 adapter options parameters shots fraction split_file
    classes domains training_images classes_per_step seed checkpoint results train_seconds"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="module")
def run(tmp_path_factory, small, colors):
    output = tmp_path_factory.mktemp("runs") / "run"
    small_run(output, small, colors)
    return output


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def change_config(folder, change):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_configuration_is_written_and_read_as_before(run, small, colors, tmp_path):
    text = CONFIG.format(model=small, root=colors)
    assert (run / "config.yaml").read_text() == text
    (tmp_path / "config.yaml").write_text(text)
    config = RunConfig.read(tmp_path / "config.yaml")
    assert config == RunConfig(
        model=small,
        data=DataConfig(root=colors, shots=4, batch_size=8, min_steps_per_epoch=3),
        optimizer=OptimizerConfig(lr=0.01),
        trainer=TrainerConfig(epochs=2, accelerator="cpu", progress=False),
    )
    old = {k: v for k, v in yaml.safe_load(text).items() if k not in ("optimizer", "trainer")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert RunConfig.read(tmp_path / "config.yaml").trainer == TrainerConfig()


def test_files_of_a_run_keep_their_formats(run, small, colors):
    """Against counts by hand, the standard library's hashes, and open_clip with merged weights."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    keys = "peft_type base_model_name_or_path base_model_sha256 options scale modules vlkr_version"
    assert list(adapter) == [*keys.split(), "model_sha256", "config_sha256"]
    assert adapter["peft_type"] == "KRADAPTER"
    assert adapter["options"] == {"scale": 2.0, "rule": "reference", "num_terms": 1} | {
        "num_factors": 2
    }
    assert len(adapter["modules"]) == 18  # q, k, v, out, fc1 and fc2 of 2 visual blocks and 1 text
    assert adapter["modules"][1] == {
        "module": "visual.transformer.resblocks.0.attn",
        "name": "k",
        "parameter": "in_proj_weight",
        "rows": [32, 64],
        "in_features": 32,
        "out_features": 32,
    }
    content = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapter["model_sha256"] == sha256(content).hexdigest()
    header, *lines = map(json.loads, (run / "split.jsonl").read_text().splitlines())
    assert header == {
        "format": "vlkr split 1",
        "dataset": "colors",
        "seed": 1,
        "shots": 4,
        "val_fraction": None,
        "per_domain": False,
        "classes": "all",
        "domains": None,
        "split_file": None,
        "class_names": sorted(COLORS),
    }
    assert {tuple(line) for line in lines} == {("key", "label", "part")}
    trained = [line for line in lines if line["part"] == "train"]
    assert sorted(line["label"] for line in trained) == [0] * 4 + [1] * 4 + [2] * 4
    assert all((colors / line["key"]).is_file() for line in lines)
    metrics = json.loads((run / "metrics.json").read_text())
    spaced = ("split_file", "training_images", "classes_per_step")
    names = [name.replace("_", " ") if name in spaced else name for name in METRICS.split()]
    assert list(metrics) == names
    assert metrics["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert (metrics["training images"], metrics["model"]) == (12, small)
    assert metrics["weights_sha256"] == adapter["base_model_sha256"]
    (result,) = metrics["results"]
    keys = "dataset model pretrained task split images templates metrics language reliability"
    assert list(result) == [*keys.split(), "worst_confusions"]
    assert list(result["metrics"]) == ["acc1", "acc5", "mean_per_class_recall", "f1", "ece", "nll"]
    folder = RunFolder.open(run)
    bundle, dataset = folder.load_model(), folder.dataset()
    state = adapter_state_dict(bundle.model)
    assert {f"base_model.model.{key}" for key in state} == set(tensors)
    assert all(torch.equal(state[k.removeprefix("base_model.model.")], tensors[k]) for k in tensors)
    assert not bundle.model.training
    (template,) = dataset.templates
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    tokens = tokenizer([template.replace("{c}", name) for name in sorted(COLORS)])
    samples = list(dataset.source("test"))
    images = [Image.open(BytesIO(sample.image)).convert("RGB") for sample in samples]
    labels = torch.tensor([sample.label for sample in samples])
    with torch.no_grad():
        features, texts, scale = bundle.model(
            torch.stack([*map(bundle.preprocess, images)]), tokens
        )
        logits = (scale * features @ texts.T).double()
    assert result["images"] == len(samples)
    expected = {
        "acc1": (logits.argmax(1) == labels).double().mean().item(),
        "acc5": 1.0,  # of three classes
        "mean_per_class_recall": recall_score(labels, logits.argmax(1), average="macro"),
        "f1": f1_score(labels, logits.argmax(1), average="macro"),
        "nll": F.cross_entropy(logits, labels).item(),
    }
    assert {m: result["metrics"][m] for m in expected} == pytest.approx(expected, abs=1e-5)
    assert bundle.label == adapter["base_model_name_or_path"]


def test_dataset_has_the_runs_prompts_and_split(copy):
    change_config(copy, lambda c: c["data"].update(templates=["{c}!"], test_fraction=0.2))
    dataset = RunFolder.open(copy).dataset()
    assert dataset.templates == ("{c}!",)
    assert sum(1 for _ in dataset.source("test")) < sum(1 for _ in dataset.source("train")) / 2


def test_validation_images_are_those_of_the_split_file(run):
    lines = map(json.loads, (run / "split.jsonl").read_text().splitlines()[1:])
    expected = {line["key"] for line in lines if line["part"] == "val"}
    validation = RunFolder.open(run).validation(["{c}?"])
    assert {sample.key for sample in validation.source("val")} == expected
    assert validation.templates == ("{c}?",)


def test_changes_name_what_a_run_depends_on():
    config = RunConfig(data=DataConfig(name="digits"))
    other = replace(
        config,
        adapter=AdapterConfig("lora", options={"rank": 8}),
        data=DataConfig(name="digits", num_workers=3, memory_gb=1, max_bad=2, shots=4),
        trainer=TrainerConfig(accelerator="cpu", progress=False),
    )
    assert config.changes(other) == {
        "adapter.name": "adapter.name is kradapter now and was lora",
        "adapter.options.rank": "adapter.options.rank is None now and was 8",
        "data.shots": "data.shots is 16 now and was 4",
    }
    assert len(NEUTRAL) == 5


def test_methods_are_labeled_by_what_differs(run, tmp_path):
    folders = []
    for i, (scale, lr, seed) in enumerate([(1.0, 0.01, 1), (1.0, 0.01, 2), (0.5, 0.1, 1)]):
        path = Path(shutil.copytree(run, tmp_path / str(i)))
        change_config(
            path, lambda c, lr=lr, seed=seed: (c.update(seed=seed), c["optimizer"].update(lr=lr))
        )
        adapter = json.loads((path / "adapter" / "adapter_config.json").read_text())
        (path / "adapter" / "adapter_config.json").write_text(
            json.dumps(adapter | {"scale": scale})
        )
        folders.append(RunFolder.open(path))
    assert [*method_labels(folders).values()] == [
        "kradapter lr=0.01 scale=1.0",
        "kradapter lr=0.01 scale=1.0",
        "kradapter lr=0.1 scale=0.5",
    ]
    assert set(method_labels(folders[:2]).values()) == {"kradapter"}


def test_fingerprint_follows_what_was_learned(copy):
    folder = RunFolder.open(copy)
    before = folder.fingerprint()
    (copy / "metrics.json").unlink()
    assert folder.fingerprint() == before
    assert folder.metrics() is None
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert folder.fingerprint() != before


def write_config(text):
    return lambda run: (run / "config.yaml").write_text(text)


def set_options(section="", **options):
    return lambda run: change_config(run, lambda c: (c[section] if section else c).update(options))


def drop_option(key, section=""):
    return lambda run: change_config(run, lambda c: (c[section] if section else c).pop(key))


def use_a_different_base(run):
    set_options(model=write_clip(run / "different", seed=1))(run)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "no run folder at"),
        (lambda run: shutil.rmtree(run / "adapter"), "is not a finished run"),
        (lambda run: (run / "config.yaml").unlink(), "is not a finished run"),
        (write_config("[1"), r"config\.yaml is not valid YAML"),
        (write_config(""), r"config\.yaml holds nothing"),
        (drop_option("model"), "it lacks model"),
        (drop_option("root", "data"), r"it lacks data\.root"),
        (drop_option("name", "adapter"), r"lacks adapter\.name"),
        (set_options(data=3), r"it lacks data\.name"),
        (set_options(model=3), "model is 3: it should be"),
        (set_options(seed="x"), "seed is .x.: it should be"),
        (set_options("data", shots="many"), "shots"),
        (set_options("optimizer", lr="big"), r"optimizer\.lr"),
        (set_options(trainer=[]), r"trainer is \[\]"),
        (set_options("adapter", blocks=True), r"adapter\.blocks"),
        (set_options(model="zzz"), "unknown model 'zzz'"),
        (use_a_different_base, "was made for a different base"),
    ],
)
def test_folders_that_are_not_a_run(copy, harm, message):
    harm(copy)
    with pytest.raises(VlkrError, match=message):
        RunFolder.open(copy).load_model()
