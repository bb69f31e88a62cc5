"""Runs to export, and the exports that README's commands make of them."""

import io
import itertools
import json
import os
import re
import shlex
import tarfile
import time
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import yaml
from helpers import MODEL, ROOT, small_run, write_clip, write_images
from PIL import Image
from safetensors.torch import save_file

from vlkr.adapters import adapter_parameters, add_adapters, save_adapter
from vlkr.adapters.inject import injected_adapters
from vlkr.cli import main
from vlkr.datasets import DataOptions, load_dataset
from vlkr.datasets.images import decode_image
from vlkr.models.classifier import ClassHead
from vlkr.models.loading import load_model

SHARD = ROOT / "data" / "digits" / "test" / "0.tar"


@pytest.fixture(scope="session")
def digit_images():
    """The first test images of the digits that ship, in the order of the shard."""
    with tarfile.open(SHARD) as archive:
        entries = [entry for entry in archive if entry.name.endswith(".png")][:96]
        return [
            Image.open(io.BytesIO(archive.extractfile(entry).read())).convert("RGB")
            for entry in entries
        ]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Name of a small CLIP with random weights."""
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    """Folder of images whose colour tells their class."""
    return write_images(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="session")
def run(tmp_path_factory, small, colors):
    """A finished run folder of the small CLIP."""
    output = tmp_path_factory.mktemp("runs") / "run"
    small_run(output, small, colors)
    return output


@pytest.fixture(scope="session")
def make_run():
    """Writes a run folder of a model on digits whose adapters are random, not trained."""

    def make_run(folder, model, pretrained=None, adapter="kradapter", *, std=0.05, **options):
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
        data = {"name": "digits", "root": None, "shots": 16, "templates": None}
        config = {
            "model": model,
            "pretrained": pretrained,
            "adapter": {
                "name": adapter,
                "options": injected_adapters(bundle.model)[0].adapter.options(),
            },
            "data": data | {"test_fraction": 0.5},
            "seed": 1,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make_run


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
def vit_run(tmp_path_factory, make_run):
    """A run of a small timm ViT, without text."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "vit.safetensors")
    return make_run(folder / "run", "timm:test_vit", str(folder / "vit.safetensors"))


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The tiny CLIP, briefly adapted to handwritten digits."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    data = DataOptions("digits", shots=4, batch_size=16, min_steps_per_epoch=8, flip=False)
    small_run(output, "tiny", None, data=data)
    return output


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, make_run):
    """The tiny CLIP with a random LoRA, big enough to be seen."""
    folder = tmp_path_factory.mktemp("runs") / "digits-lora"
    return make_run(folder, "tiny", adapter="lora", std=0.2, rank=4, alpha=2.0)


class Exports:
    """README's export section in a folder where its commands are run, each at most once.

    Attributes:
        folder: to work in.
        python: README's lines that load an export, by its folder's name.
        rest: README's other Python.
        options: of README's ``vlkr export``, by the folder it writes.
        predict: README's other commands.
        seconds: of CPU time that each export took, by its folder's name.
    """

    def __init__(self, folder):
        self.folder = folder
        self.python, self.options, self.seconds = {}, {}, {}
        self.rest, self.predict = [], []
        section = (ROOT / "README.md").read_text().split("\n## Export\n")[1].split("\n## ")[0]
        blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
        commands = [line for kind, text in blocks if kind == "bash" for line in text.splitlines()]
        for words in map(shlex.split, commands):
            if words[1] == "export":
                options = dict(zip(words[2::2], words[3::2], strict=True))
                self.options[options["--output"]] = options
            else:
                self.predict.append(words)
        for text in (text for kind, text in blocks if kind == "python"):
            loaded = [name for name in self.options if re.search(rf'\b{name}["/]', text)]
            loaded = [name for name in loaded if name != "base"]
            if loaded:
                self.python[loaded[0]] = text
            else:
                self.rest.append(text)

    def call(self, words):
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            assert words[0] == "vlkr"
            return main(words[1:])
        finally:
            os.chdir(before)

    def make(self, name):
        """Runs README's command that writes this folder."""
        if name not in self.seconds:
            started = time.process_time()
            words = ["vlkr", "export", *itertools.chain(*self.options[name].items())]
            assert self.call(words) == 0
            self.seconds[name] = time.process_time() - started
        return self.folder / name

    def run(self, name):
        """The run that this folder is made from."""
        return self.folder / self.options[name]["--run"]


@pytest.fixture(scope="session")
def exports(tmp_path_factory, digits_run, lora_run, vit_run, digit_images):
    """README's export section, ready to be run."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "runs").mkdir()
    for name, run in {"digits": digits_run, "digits-lora": lora_run, "photos-vit": vit_run}.items():
        (folder / "runs" / name).symlink_to(run)
    (folder / "photos" / "deeper").mkdir(parents=True)
    for i, image in enumerate(digit_images[:6]):
        image.save(folder / "photos" / ("deeper" if i % 2 else ".") / f"{i}.png")
    return Exports(folder)
