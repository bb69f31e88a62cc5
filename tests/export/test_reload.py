"""Each export, loaded by README's lines in a process where vlkr cannot be imported."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from export.outputs import outputs, prompts_of
from helpers import ROOT
from safetensors.torch import load_file, save_file

from vlkr.cli import main
from vlkr.export.export import export
from vlkr.runs import RunFolder

SHARD = ROOT / "data" / "digits" / "test" / "0.tar"
COUNT = 96
SIZES = (1, 7, 64)

START = """
import importlib.abc, io, json, sys, tarfile
import numpy as np
from PIL import Image
task = json.loads(sys.argv[1])
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in task["blocked"]:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
try:
    import vlkr
except ModuleNotFoundError:
    pass
else:
    sys.exit("vlkr was imported")
with tarfile.open(task["shard"]) as archive:
    entries = [entry for entry in archive if entry.name.endswith(".png")][: task["count"]]
    images = [
        Image.open(io.BytesIO(archive.extractfile(entry).read())).convert("RGB")
        for entry in entries
    ]
prompts, names = task["prompts"], task["names"]
def pixels_of(metadata):
    # What a user writes: pixels by the settings in the file.
    settings = metadata["preprocessing"]
    assert settings["interpolation"] == "bicubic" and settings["crop_pct"] == 1
    assert all(image.width == image.height for image in images)  # no crop, whatever the mode
    size = settings["size"][::-1]
    squashed = [np.asarray(image.resize(size, Image.BICUBIC), np.float32) / 255 for image in images]
    mean, std = np.float32(settings["mean"]), np.float32(settings["std"])
    return np.ascontiguousarray(((np.stack(squashed) - mean) / std).transpose(0, 3, 1, 2))
def save(name, **arrays):
    np.savez(name + ".npz", **{key: np.asarray(array) for key, array in arrays.items()})
def save_all(name, model, features, texts):
    classes = texts.unflatten(0, (len(names), -1)).mean(1)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    logits = model.logit_scale.exp().detach() * features @ classes.T
    save(name, features=features, texts=texts, logits=logits)
"""

# What a user does next, by README's names: features of images and texts, logits of the classes.
ENDS = {
    "open_clip": """
import torch
model.eval()
with torch.no_grad():
    features = model.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
    texts = model.encode_text(tokenizer(prompts), normalize=True)
save_all(NAME, model, features, texts)
""",
    "transformers": """
import torch
with torch.no_grad():
    found = model(**processor(text=prompts, images=images, padding=True, return_tensors="pt"))
save_all(NAME, model, found.image_embeds, found.text_embeds)
""",
    "timm": """
import torch
with torch.no_grad():
    pixels = torch.stack([preprocess(i) for i in images])
    logits = model(pixels)
    headless = timm.create_model("local-dir:" + NAME, pretrained=True, num_classes=0).eval()
    features = torch.nn.functional.normalize(headless(pixels), dim=-1)
assert model.pretrained_cfg["label_names"] == names
save(NAME, features=features, logits=logits)
""",
    "timm tower": """
import torch
with torch.no_grad():
    features = torch.nn.functional.normalize(model(torch.stack([preprocess(i) for i in images])))
save(NAME, features=features)
""",
    "adapter": """
import torch
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained("base")
with torch.no_grad():
    found = model(**processor(text=prompts, images=images, padding=True, return_tensors="pt"))
save_all(NAME, model, found.image_embeds, found.text_embeds)
""",
    "onnx": """
def session(name):
    return onnxruntime.InferenceSession(NAME + "/" + name + ".onnx")
metadata = {k: json.loads(v) for k, v in classifier.get_modelmeta().custom_metadata_map.items()}
assert labels == names
pixels = pixels_of(metadata)
encoder = session("image_encoder")
(features,) = encoder.run(["image_features"], {"pixel_values": pixels})
(logits,) = classifier.run(["logits"], {"pixel_values": pixels})
tokens = np.int64(task["tokens"])
(texts,) = session("text_encoder").run(["text_features"], {"input_ids": tokens})
for size in task["sizes"]:
    some = np.resize(pixels, (size, *pixels.shape[1:]))
    (part,) = encoder.run(None, {"pixel_values": some})
    assert np.abs(part - np.resize(features, part.shape)).max() < 1e-5, size
    (part,) = classifier.run(None, {"pixel_values": some})
    assert part.shape == (size, len(names))
    some = np.resize(tokens, (size, tokens.shape[1]))
    (part,) = session("text_encoder").run(None, {"input_ids": some})
    assert len(part) == size
assert "torch" not in sys.modules
save(NAME, features=features, texts=texts, logits=logits)
""",
    "torch": """
extra = {"metadata.json": ""}
torch.export.load(NAME + "/classifier.pt2", extra_files=extra)
metadata = json.loads(extra["metadata.json"])
assert metadata["labels"] == names
pixels = torch.from_numpy(pixels_of(metadata))
tokens = torch.tensor(task["tokens"])
text_encoder = torch.export.load(NAME + "/text_encoder.pt2").module()
with torch.no_grad():
    features, logits, texts = image_encoder(pixels), classifier(pixels), text_encoder(tokens)
    for size in task["sizes"]:
        repeated = torch.arange(size)
        some = pixels[repeated % len(pixels)]
        found = image_encoder(some)
        assert (found - features[repeated % len(pixels)]).abs().max() < 1e-5, size
        assert classifier(some).shape == (size, len(names))
        assert len(text_encoder(tokens[repeated % len(tokens)])) == size
save(NAME, features=features, texts=texts, logits=logits)
""",
}
GROUPS = {
    "libraries": {"open_clip", "transformers", "timm", "adapter"},
    "onnx": {"onnx"},
    "torch": {"torch"},
}
# torch looks for onnx and torchvision by itself, and does not need them.
BLOCKED = {
    "libraries": {"vlkr"},
    "onnx": {"vlkr", "open_clip", "timm", "transformers", "peft", "torch", "onnx"},
    "torch": {"vlkr", "open_clip", "timm", "transformers", "peft", "lightning", "safetensors"},
}


def reload(cwd, lines, run, blocked, count=COUNT):
    """Runs the lines that load exports, by the exports' names, and what a user does next."""
    names, prompts = prompts_of(run)
    bundle = RunFolder.open(run).load_model()
    tokens = bundle.tokenizer(prompts).tolist() if bundle.has_text else []
    parts = [START]
    for name, (format_name, text) in lines.items():
        parts += [f"NAME = {name!r}\n", text, ENDS[format_name]]
    parts.append("assert not [name for name in sys.modules if name.split('.')[0] == 'vlkr']\n")
    task = {
        "blocked": sorted(blocked),
        "shard": str(SHARD),
        "count": count,
        "sizes": SIZES,
        "prompts": prompts,
        "tokens": tokens,
        "names": names,
    }
    code = "".join(parts).replace("import torch\n", "import torch; torch.set_num_threads(1)\n", 1)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps(task)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: dict(np.load(cwd / f"{name}.npz")) for name in lines}


def assert_same(found, run, images):
    features, texts, logits = outputs(run, images)
    assert F.cosine_similarity(torch.tensor(found["features"]), features).min() >= 0.99999
    if "texts" in found:
        assert F.cosine_similarity(torch.tensor(found["texts"]), texts).min() >= 0.99999
    if "logits" in found:
        assert torch.equal(torch.tensor(found["logits"]).argmax(1), logits.argmax(1))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, make_run):
    """The tiny CLIP with a random LoRA, big enough to be seen."""
    folder = tmp_path_factory.mktemp("runs") / "digits-lora"
    return make_run(folder, "tiny", adapter="lora", std=0.2, rank=4, alpha=2.0)


class Exports:
    """README's export section, whose commands are run in ``folder``, each at most once.

    ``python`` are the lines that load an export and ``options`` those of ``vlkr export``, by the
    export's folder; ``rest`` is the other Python and ``predict`` the other commands; ``seconds``
    is the CPU time of each export.
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


@pytest.fixture(scope="module")
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


def without_blank_lines(text):
    return "\n".join(line for line in text.splitlines() if line)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_readme_loads_each_format_without_vlkr(group, exports, digit_images):
    lines = {
        name: (exports.options[name]["--format"], text)
        for name, text in exports.python.items()
        if exports.options[name]["--format"] in GROUPS[group]
    }
    assert {format_name for format_name, _ in lines.values()} == GROUPS[group]
    for name, (_, text) in lines.items():
        assert without_blank_lines(text).count("\n") == 2
        exports.make(name)
        card = (exports.folder / name / "README.md").read_text()
        assert without_blank_lines(text) in without_blank_lines(card)
    if group == "libraries":
        exports.make("base")
    run = exports.run("digits-open_clip")
    found = reload(exports.folder, lines, run, BLOCKED[group])
    for name in lines:
        assert_same(found[name], exports.run(name), digit_images)
        assert exports.seconds[name] < 30, f"{name} took {exports.seconds[name]:.0f} s"


@pytest.mark.slow
def test_the_rest_of_readme_runs(exports, capsys, monkeypatch):
    exports.make("digits-onnx")
    exports.make("digits-open_clip")
    table, to_file = exports.predict
    capsys.readouterr()
    assert exports.call(table) == 0
    printed = capsys.readouterr().out
    assert "6 images" in printed
    assert all(f"{i}.png" in printed for i in range(6))
    assert exports.call(to_file) == 0
    lines = (exports.folder / "labels.csv").read_text().splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("image,label,probability,label_2,probability_2,label_3")
    monkeypatch.chdir(exports.folder)
    (text,) = exports.rest
    exec(text, {})
    weights = load_file(exports.folder / "digits-half" / "open_clip_model.safetensors")
    assert weights["visual.proj"].dtype == torch.float16


@pytest.mark.slow  # it makes the slow tests above mean something
def test_the_adapted_models_differ_from_their_bases(digits_run, lora_run, vit_run, digit_images):
    for run in (digits_run, lora_run, vit_run):
        adapted, base = (outputs(run, digit_images, scale=scale) for scale in (1, 0))
        assert len(adapted.logits.argmax(1).unique()) > 1
        assert F.cosine_similarity(adapted.features, base.features).min() < 0.99
        assert not torch.equal(adapted.logits.argmax(1), base.logits.argmax(1))


@pytest.fixture(scope="module")
def vit_b_32(tmp_path_factory, make_run):
    """A run of open_clip's ViT-B-32 with random weights, with a LoRA."""
    folder = tmp_path_factory.mktemp("vit_b_32")
    torch.manual_seed(0)
    weights = open_clip.create_model("ViT-B-32").state_dict()
    save_file(weights, folder / "weights.safetensors")
    model = ("ViT-B-32", str(folder / "weights.safetensors"))
    return make_run(folder / "run", *model, adapter="lora", std=0.1, rank=4)


@pytest.fixture(scope="module")
def timm_clip(tmp_path_factory, make_run, write_model):
    """A run of a CLIP whose image tower is timm's ViT-Ti/16."""
    folder = tmp_path_factory.mktemp("timm_clip")
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "image_size": 224}
    return make_run(folder / "run", write_model(folder / "clip", vision_cfg=vision), std=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("vit_b_32", name) for name in ("open_clip", "transformers", "adapter", "onnx", "torch")),
        *(("timm_clip", name) for name in ("open_clip", "timm tower", "onnx", "torch")),
    ],
)
def test_larger_models_without_vlkr(model, name, request, digit_images, tmp_path):
    run = request.getfixturevalue(model)
    export(run, tmp_path / "out", format=name.removesuffix(" tower"))
    if name == "adapter":
        export(run, tmp_path / "base", format="transformers", alpha=0)
    card = (tmp_path / "out" / "README.md").read_text()
    lines = {"out": (name, card.split("```python\n")[1].split("```")[0])}
    found = reload(tmp_path, lines, run, BLOCKED.get(name, {"vlkr"}), count=8)
    assert_same(found["out"], run, digit_images[:8])
