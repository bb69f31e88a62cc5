"""Numbers that go wrong while training: it stops at once, says where, and spoils nothing."""

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import color_image, small_run, write_images, write_tar
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file, save_file

from vlkr.adapters.hosts import adapter_layers
from vlkr.config import OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.training.module import FewShotModule
from vlkr.training.trainer import check_checkpoint

pytestmark = pytest.mark.faults

LOSS = "numbers: not finite"
DATA = "numbers: extreme data"
SCALE = "numbers: logit scale"
LAYER = "visual.transformer.resblocks.1.mlp.c_fc"
CPU = {"accelerator": "cpu", "progress": False}


@pytest.fixture(scope="module")
def unbroken(small, colors, tmp_path_factory):
    run = small_run(tmp_path_factory.mktemp("whole") / "run", small, colors).output
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def host(module, path):
    return dict(adapter_layers(module.model))[path]


def spoil_factors(module):
    next(host(module, LAYER).adapters.parameters()).data.fill_(math.nan)


def spoil_gradient(module):
    next(host(module, LAYER).adapters.parameters()).register_hook(lambda g: g * math.inf)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(spoil_factors, "the loss is nan"), (spoil_gradient, "the gradient is not finite")],
)
def test_it_stops_at_once_and_the_checkpoint_before_it_is_whole(
    tmp_path, small, colors, case, monkeypatch, unbroken, spoil, message
):
    step = FewShotModule.training_step
    keys = []

    def spoilt(self, batch, batch_idx):
        if self.global_step == 4:
            spoil(self)
            keys.extend(batch.keys)
        assert self.global_step < 5
        return step(self, batch, batch_idx)

    run = tmp_path / "run"
    with case(LOSS):
        with monkeypatch.context() as patch:
            patch.setattr(FewShotModule, "training_step", spoilt)
            with pytest.raises(VlkrError) as error:
                small_run(run, small, colors)
        told = str(error.value)
        assert told.startswith(f"{message} at step 4 (learning rate 0.0025, samples ")
        assert all(key in told for key in keys)
        assert len(keys) == 8
        assert f"first in {LAYER}" in told
        assert not (run / "adapter").exists()
        check_checkpoint(run / "checkpoints" / "last.ckpt")
        small_run(run, small, colors, resume=True)
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == unbroken


def test_a_last_step_that_spoils_the_factors_is_never_saved(tmp_path, small, colors, case):
    options = {
        "optimizer": OptimizerConfig(lr=1e30, weight_decay=1e10),
        "data": DataConfig(root=colors, shots=2, batch_size=8, min_steps_per_epoch=1),
        "trainer": TrainerConfig(epochs=1, **CPU),
    }
    with case(LOSS):
        with pytest.raises(VlkrError, match=r"not finite after step 1; lower optimizer\.lr"):
            small_run(tmp_path / "run", small, colors, **options)
        assert not (tmp_path / "run" / "adapter").exists()
        assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize("lr", [1e31, 1e300, math.inf, math.nan, 0.0, -1.0])
def test_a_learning_rate_beyond_numbers_is_refused(tmp_path, small, colors, case, lr):
    with case(LOSS), pytest.raises(VlkrError, match=r"optimizer\.lr is .*: "):
        small_run(tmp_path / "run", small, colors, optimizer=OptimizerConfig(lr=lr))


def half_precision(monkeypatch, init_scale):
    """Lets the CPU train with fp16 and loss scaling, as a GPU does with 16-mixed."""
    make = L.Trainer

    def trainer(**options):
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        options["plugins"].append(MixedPrecision("16-mixed", "cpu", scaler))
        return make(**{key: value for key, value in options.items() if key != "precision"})

    monkeypatch.setattr(L, "Trainer", trainer)


HALF = TrainerConfig(epochs=4, precision="16-mixed", **CPU)


def test_steps_that_overflow_in_fp16_are_left_out(tmp_path, small, colors, case, monkeypatch):
    half_precision(monkeypatch, init_scale=2.0**22)
    with case("numbers: fp16 overflow"):
        run = small_run(tmp_path / "run", small, colors, trainer=HALF).output
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["MixedPrecision"]["scale"] < 2.0**22
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_fp16_that_overflows_for_ever_is_told(tmp_path, small, colors, case, monkeypatch):
    half_precision(monkeypatch, init_scale=16.0)
    start = FewShotModule.on_train_start

    def spoilt(self):
        start(self)
        spoil_gradient(self)

    monkeypatch.setattr(FewShotModule, "on_train_start", spoilt)
    told = rf"at step \d+ \(a loss scale of 0\.5, .*{LAYER}"
    with case("numbers: fp16 overflow"), pytest.raises(VlkrError, match=told):
        small_run(tmp_path / "run", small, colors, trainer=HALF)


def test_fp16_on_a_device_without_it_is_refused(tmp_path, small, colors, case):
    with case("numbers: fp16 overflow"):
        with pytest.raises(VlkrError, match="'16-mixed' is not possible on this device"):
            small_run(tmp_path / "run", small, colors, trainer=HALF)
        assert not (tmp_path / "run").exists()


def with_logit_scale(small, folder, value):
    source = Path(small.removeprefix("local-dir:"))
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes((source / "open_clip_config.json").read_bytes())
    tensors = load_file(source / "open_clip_model.safetensors")
    tensors["logit_scale"] = torch.full_like(tensors["logit_scale"], value)
    save_file(tensors, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.mark.parametrize("value", [89.0, 12.0, math.inf, -math.inf, math.nan])
def test_a_logit_scale_out_of_range_is_refused(tmp_path, small, colors, case, value):
    model = with_logit_scale(small, tmp_path / "clip", value)
    with case(SCALE):
        with pytest.raises(VlkrError, match=r"the logit scale of .* expected above 0"):
            small_run(tmp_path / "run", model, colors)
        assert not (tmp_path / "run").exists()


def test_a_large_logit_scale_is_trained_with(tmp_path, small, colors, case):
    model = with_logit_scale(small, tmp_path / "clip", math.log(5000))
    with case(SCALE):
        result = small_run(tmp_path / "run", model, colors)
        assert math.isfinite(result.evaluation.in_distribution.metrics["nll"])


def test_a_class_with_one_image(tmp_path, small, case):
    root = write_images(tmp_path / "images", per_class=4, splits=("train", "test"))
    for path in list((root / "train" / "red").iterdir())[1:]:
        path.unlink()
    with case(DATA), pytest.warns(UserWarning, match="class 'red' has 1 image"):
        small_run(tmp_path / "run", small, root)


def test_all_images_alike(tmp_path, small, case):
    root = write_images(tmp_path / "images")
    for path in root.rglob("*.png"):
        path.write_bytes(color_image("red", 0))
    with case(DATA):
        metrics = small_run(tmp_path / "run", small, root).evaluation.in_distribution.metrics
        assert all(math.isfinite(value) for value in metrics.values())


def test_one_class(tmp_path, small, case):
    root = write_images(tmp_path / "images", names=["red"])
    with case(DATA), pytest.raises(VlkrError, match="one class"):
        small_run(tmp_path / "run", small, root)


@pytest.mark.slow
def test_ten_thousand_classes(tmp_path, small, case):
    names = [f"thing number {i}" for i in range(10_000)]
    root = tmp_path / "many"
    image = color_image("red", 0)
    for split, labels in (("train", range(10_000)), ("test", range(0, 10_000, 1000))):
        (root / split).mkdir(parents=True)
        (root / split / "nshards.txt").write_text("1")
        write_tar(root / split / "0.tar", [(f"{split}{i}", image, i) for i in labels])
    (root / "classnames.txt").write_text("\n".join(names))
    data = DataConfig(
        root=root, shots=1, batch_size=1024, min_steps_per_epoch=1, classes_per_step=2048
    )
    with case(DATA):
        trainer = TrainerConfig(epochs=1, **CPU)
        result = small_run(tmp_path / "run", small, root, data=data, trainer=trainer)
        assert result.evaluation.in_distribution.images == 10
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["classes per step"] == 2048
