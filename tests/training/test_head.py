"""Models without text: their classes are learned from the shots, with the adapters."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import small_run, write_images
from PIL import Image
from safetensors.torch import load_file

from vlkr.config import OptimizerConfig
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate
from vlkr.evaluation.interpolation import interpolate
from vlkr.models.timm import load_vit
from vlkr.runs import RunFolder
from vlkr.training.module import FewShotModule


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder of timm's layout with a small ViT of random weights."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    timm.models.save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
    return f"timm:local-dir:{folder}"


@pytest.fixture(scope="module")
def run(tmp_path_factory, vit, colors):
    return small_run(tmp_path_factory.mktemp("runs") / "run", vit, colors)


def test_learns_the_classes_and_is_evaluated(run):
    metrics = json.loads((run.output / "metrics.json").read_text())
    assert metrics["results"][0]["metrics"]["acc1"] > 0.8
    head = load_file(run.output / "head.safetensors")["weight"]
    adapters = load_file(run.output / "adapter" / "adapter_model.safetensors")
    trained = head.numel() + sum(t.numel() for t in adapters.values())
    assert run.parameters == metrics["parameters"] == trained


def test_interpolation_keeps_the_head(run, vit, colors):
    found = interpolate(run.output, alphas=[0, 1], device="cpu")
    base, adapted = (point.evaluation.in_distribution for point in found.points)
    assert adapted.metrics == run.evaluation.in_distribution.metrics
    assert adapted.templates == "none (classes learnt from images)"
    bundle = load_vit(vit)
    head = F.normalize(load_file(run.output / "head.safetensors")["weight"], dim=-1)
    correct = []
    for sample in RunFolder.open(run.output).dataset().source("test"):
        image = bundle.preprocess(Image.open(colors / sample.key).convert("RGB"))[None]
        with torch.no_grad():
            correct.append(bool((bundle.model.visual(image) @ head.T).argmax() == sample.label))
    assert base.metrics["acc1"] == pytest.approx(sum(correct) / len(correct), abs=1e-6)


def test_the_head_starts_at_the_classes_mean_features(tmp_path, vit, colors):
    options = OptimizerConfig(lr=1e-12, weight_decay=0)
    run = small_run(tmp_path / "run", vit, colors, optimizer=options).output
    split = [json.loads(line) for line in (run / "split.jsonl").read_text().splitlines()]
    bundle = load_vit(vit)
    found = load_file(run / "head.safetensors")["weight"]
    for label, name in enumerate(("blue", "green", "red")):
        keys = [row["key"] for row in split if row.get("part") == "train" and row["label"] == label]
        assert len(keys) == 4
        images = [Image.open(colors / key).convert("RGB") for key in keys]
        images = torch.stack([bundle.preprocess(image) for image in images])
        with torch.no_grad():
            mean = F.normalize(F.normalize(bundle.model.visual(images), dim=-1).mean(0), dim=0)
        torch.testing.assert_close(found[label], mean, rtol=1e-4, atol=1e-5), name


def test_resumed_run_ends_as_an_unbroken_one(tmp_path, vit, colors, run, monkeypatch):
    step = FewShotModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FewShotModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "run", vit, colors)
    monkeypatch.setattr(FewShotModule, "training_step", step)
    small_run(tmp_path / "run", vit, colors, resume=True)
    for name in ("head.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run.output / name).read_bytes()


def test_what_a_model_without_text_cannot_classify_is_refused(run, vit, colors, tmp_path):
    other = write_images(tmp_path / "other", names=("red", "green"))
    (other / "green").rename(other / "grass")
    with pytest.raises(VlkrError, match="class 'grass' was not learned"):
        evaluate(run=run.output, datasets=[str(other)])
    with pytest.raises(VlkrError, match="no classes before it is adapted"):
        evaluate(model=vit, datasets=[str(colors)])
