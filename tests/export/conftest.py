"""Runs to export, and their exports, each made once."""

import io
import itertools
import json
import tarfile

import open_clip
import pytest
import timm
import torch
import yaml
from helpers import MODEL, ROOT, small_run
from PIL import Image
from safetensors.torch import save_file

from vlkr.adapters import adapter_parameters, add_adapters, save_adapter
from vlkr.adapters.inject import injected_adapters
from vlkr.datasets import DataConfig, load_dataset
from vlkr.datasets.images import decode_image
from vlkr.export.export import export
from vlkr.models.classifier import ClassHead
from vlkr.models.loading import load_model


@pytest.fixture(scope="session")
def digit_images():
    """The first test images of the bundled digits, in the order of the shard."""
    with tarfile.open(ROOT / "data" / "digits" / "test" / "0.tar") as archive:
        entries = [entry for entry in archive if entry.name.endswith(".png")][:96]
        return [
            Image.open(io.BytesIO(archive.extractfile(entry).read())).convert("RGB")
            for entry in entries
        ]


@pytest.fixture(scope="session")
def run(tmp_path_factory, small, colors):
    """A finished run folder of the small CLIP."""
    output = tmp_path_factory.mktemp("runs") / "run"
    small_run(output, small, colors)
    return output


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The tiny CLIP, briefly adapted to handwritten digits."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    data = DataConfig("digits", shots=4, batch_size=16, min_steps_per_epoch=8, flip=False)
    small_run(output, "tiny", None, data=data)
    return output


@pytest.fixture(scope="session")
def make_run():
    """Writes a run folder of a model on digits whose adapters are random, not trained."""

    def make_run(
        folder, model, pretrained=None, adapter="kradapter", *, std=0.05, data=None, **options
    ):
        bundle = load_model(model, pretrained)
        torch.manual_seed(0)
        add_adapters(bundle.model, adapter, **options)
        with torch.no_grad():
            for factor in adapter_parameters(bundle.model):
                factor.add_(std * torch.randn_like(factor))
        folder.mkdir(parents=True)
        save_adapter(bundle.model, folder / "adapter", base_model=bundle.label)
        if not bundle.has_text:
            head = ClassHead(load_dataset("digits").class_names, bundle.model_cfg["embed_dim"])
            samples = list(itertools.islice(load_dataset("digits").source("train"), 100))
            pixels = torch.stack([bundle.preprocess(decode_image(s)) for s in samples])
            labels = torch.tensor([s.label for s in samples])
            with torch.no_grad():
                head.start([(bundle.model.encode_image(pixels, normalize=True), labels)])
            head.save(folder / "head.safetensors")
        config = {
            "model": model,
            "pretrained": pretrained,
            "adapter": {
                "name": adapter,
                "options": injected_adapters(bundle.model)[0].adapter.options(),
            },
            "data": {"name": "digits", "root": None, "shots": 16, "templates": None}
            | {"test_fraction": 0.5}
            | (data or {}),
            "seed": 1,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make_run


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory, make_run):
    """A run of a small timm ViT, without text."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "vit.safetensors")
    return make_run(folder / "run", "timm:test_vit", str(folder / "vit.safetensors"))


@pytest.fixture(scope="session")
def write_model():
    """Writes an open_clip folder of a small model that is changed in some entries."""

    def write_model(
        folder, resize_mode="squash", fill_color=None, vision_cfg=None, text_cfg=None, **changes
    ):
        vision = MODEL["vision_cfg"] if "timm_model_name" not in (vision_cfg or {}) else {}
        config = {
            "embed_dim": 24,
            "vision_cfg": {**vision, **(vision_cfg or {})},
            "text_cfg": {**MODEL["text_cfg"], **(text_cfg or {})},
            **changes,
        }
        preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
        preprocess["resize_mode"] = resize_mode
        if fill_color is not None:
            preprocess["fill_color"] = fill_color
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
        )
        cls = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
        torch.manual_seed(0)
        model = cls(**{key: value for key, value in config.items() if key != "custom_text"})
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        return f"local-dir:{folder}"

    return write_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Exports a run once for each set of options; tests must leave the folder as it is."""
    results = {}

    def exported(run, format="open_clip", dtype="float32", alpha=1):
        key = (run, format, dtype, alpha)
        if key not in results:
            output = tmp_path_factory.mktemp("exports") / "export"
            results[key] = export(run, output, format=format, dtype=dtype, alpha=alpha)
        return results[key]

    return exported
