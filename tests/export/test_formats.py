import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import open_clip
import pytest
import timm
import torch
from helpers import small_run, tree
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from vlkr.adapters import merge_adapters
from vlkr.cli import main
from vlkr.datasets import DataOptions
from vlkr.errors import VlkrError
from vlkr.evaluation.interpolation import interpolate
from vlkr.export import parity
from vlkr.export.export import export
from vlkr.export.formats import Preprocessing
from vlkr.files import resource
from vlkr.models.clip import load_clip
from vlkr.runs import RunFolder

COMMON = {"README.md", "class_embeddings.safetensors", "vlkr_export.json"}
FILES = {
    "open_clip": {"open_clip_config.json", "open_clip_model.safetensors"},
    "timm": {"config.json", "model.safetensors"},
    "transformers": {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    },
    "onnx": {"classifier.onnx", "image_encoder.onnx", "text_encoder.onnx", "tokenizer.json"},
    "torch": {"classifier.pt2", "image_encoder.pt2", "text_encoder.pt2"},
    "adapter": {"adapter_config.json", "adapter_model.safetensors"},
}
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TRACED = [pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "torch")]


def merged(run):
    bundle = RunFolder.open(run).load_model()
    merge_adapters(bundle.model)
    return bundle


# What each format writes


@pytest.mark.parametrize("name", ["open_clip", "transformers", "adapter", "timm", *TRACED])
def test_writes_its_files_and_says_what_was_compared(name, run, vit_run, tmp_path, capsys):
    source = vit_run if name == "timm" else run
    arguments = [
        "export",
        "--run",
        str(source),
        "--output",
        str(tmp_path / "out"),
        "--format",
        name,
    ]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"({name}, float32)" in printed
    assert set(tree(tmp_path / "out")) == COMMON | FILES[name]
    manifest = json.loads((tmp_path / "out" / "vlkr_export.json").read_text())
    images = 64 if name == "timm" else 19
    assert f"Compared on {images} test images" in printed
    assert "same predictions 100%" in printed
    assert manifest["parity"]["images"] == images
    assert manifest["parity"]["min_image_cosine"] >= 0.99999
    assert (manifest["parity"]["min_text_cosine"] is None) == (name == "timm")
    assert manifest["base_sha256"] == RunFolder.open(source).load_model().weights_hash
    assert manifest["adapter"]["name"] == "kradapter"


def test_weights_are_the_merged_ones(run, small, tmp_path):
    export(run, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    base = load_file(Path(small.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    assert set(base) <= set(exported)
    state = merged(run).model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in exported.items())
    changed = {key for key, tensor in base.items() if not torch.equal(exported[key], tensor)}
    assert {key.rsplit(".", 1)[-1] for key in changed} == {"in_proj_weight", "weight"}
    assert not {key for key in changed if "ln" in key or "embedding" in key or "conv" in key}


@pytest.mark.parametrize("dtype", HALF)
def test_weights_are_merged_in_fp32_and_then_cast(dtype, run, tmp_path):
    result = export(run, tmp_path / "out", dtype=dtype)
    assert result.parity.bound == 0.999
    state = merged(run).model.state_dict()
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    for key, tensor in exported.items():
        wanted = state[key] if state[key].numel() == 1 else state[key].to(HALF[dtype])
        assert tensor.dtype is wanted.dtype
        assert torch.equal(tensor, wanted), key


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("timm", "float16"),
        ("timm", "bfloat16"),
        ("transformers", "float16"),
        ("transformers", "bfloat16"),
        ("adapter", "bfloat16"),
    ],
)
def test_half_precision_is_what_lies_on_disk(dtype, name, run, vit_run, tmp_path):
    result = export(vit_run if name == "timm" else run, tmp_path / "out", format=name, dtype=dtype)
    assert result.parity.min_image_cosine >= 0.999
    weights = "adapter_model" if name == "adapter" else "model"
    tensors = load_file(tmp_path / "out" / f"{weights}.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.numel() > 1} == {HALF[dtype]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_graphs(dtype, run, tmp_path):
    found = export(run, tmp_path / "torch", format="torch", dtype=dtype).parity
    assert min(found.min_image_cosine, found.min_text_cosine) >= 0.999
    program = torch.export.load(tmp_path / "torch" / "image_encoder.pt2")
    assert {tensor.dtype for tensor in program.state_dict.values()} == {HALF[dtype]}
    found = export(run, tmp_path / "onnx", format="onnx", dtype=dtype).parity
    assert min(found.min_image_cosine, found.min_text_cosine) >= 0.999
    for name in ("image_encoder", "text_encoder", "classifier"):
        graph = onnx.load(tmp_path / "onnx" / f"{name}.onnx").graph
        kinds = {t.data_type for t in graph.initializer if t.dims and max(t.dims) > 1}
        wanted = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
        assert kinds - {onnx.TensorProto.INT64} == {wanted[dtype]}
        types = {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
        assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.slow
def test_graphs_hold_no_pickle_and_no_weights_of_the_other_tower(run, tmp_path):
    export(run, tmp_path / "out", format="torch")
    state = merged(run).model.state_dict()
    for name, tower in (("image_encoder", "visual."), ("text_encoder", "")):
        path = tmp_path / "out" / f"{name}.pt2"
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        assert not [f for f, size in sizes.items() if f.endswith((".pkl", ".pt")) and size]
        own = torch.export.load(path).state_dict
        size = sum(t.numel() for k, t in state.items() if k.startswith("visual.") == bool(tower))
        assert abs(sum(t.numel() for t in own.values()) - size) <= 1  # the logit scale


def test_alpha_is_the_strength_of_the_change(run, small, tmp_path):
    export(run, tmp_path / "out", alpha=0.25)
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    base = load_file(Path(small.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    full = merged(run).model.state_dict()
    for key, tensor in base.items():
        wanted = tensor + 0.25 * (full[key] - tensor)
        torch.testing.assert_close(exported[key], wanted, atol=1e-6, rtol=1e-5)
    export(run, tmp_path / "base", alpha=0)
    exported = load_file(tmp_path / "base" / "open_clip_model.safetensors")
    assert all(torch.equal(exported[key], tensor) for key, tensor in base.items())


def test_onnx_tokenizer_gives_the_same_ids(small, tmp_path):
    from vlkr.export.hf_clip import write_tokenizer

    bundle = load_clip(small)
    write_tokenizer(bundle, tmp_path)
    texts = [
        "a photo of a red square.",
        "Don't  SHOUT, 42 naïve cafés!",
        "",
        "long " * 40,
        "日本 😀",
    ]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    assert found == bundle.tokenizer(texts).tolist()


# Wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format onxx", "unknown format 'onxx'; known: open_clip, timm, transformers, onnx"),
        ("--dtype int8", "unknown dtype 'int8'; known: float32, float16, bfloat16"),
        ("--alpha -1", "alpha -1.0 is out of range, expected at least 0; 0 is the base"),
        ("--alpha .inf", "alpha inf is out of range"),
        ("--push-to-hub a/b/c", "'a/b/c' is not a repository, expected ORG/NAME"),
    ],
)
def test_wrong_options_are_one_line(options, message, run, tmp_path, capsys):
    arguments = ["export", "--run", str(run), "--output", str(tmp_path / "out"), *options.split()]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(("name", "missing"), [("onnx", "onnxruntime"), ("transformers",) * 2])
def test_a_library_that_is_not_installed_is_named(name, missing, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    for module in ("onnx", "transformers"):
        monkeypatch.delitem(sys.modules, f"vlkr.export.{module}", raising=False)
    with pytest.raises(VlkrError, match=rf"needs {missing}, .* pip install 'vlkr\[export\]'"):
        export(run, tmp_path / "out", format=name)
    assert tree(tmp_path) == {}


# The parity check


def test_a_difference_fails_and_leaves_nothing(run, tmp_path, monkeypatch):
    from vlkr.export import open_clip as writer

    save = writer.save_open_clip_folder

    def save_wrongly(bundle, folder, tensors):
        wrong = {key: tensor.clone() for key, tensor in tensors.items()}
        wrong["visual.proj"] += 0.1 * torch.randn_like(wrong["visual.proj"])
        save(bundle, folder, wrong)

    monkeypatch.setattr(writer, "save_open_clip_folder", save_wrongly)
    for dtype in ("float32", "float16"):
        with pytest.raises(VlkrError, match="the export differs from the adapted model"):
            export(run, tmp_path / "out", dtype=dtype)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("part", ["visual.proj", "text_projection"])
def test_features_that_are_not_finite_are_a_difference(part, run, tmp_path, monkeypatch):
    load_model = RunFolder.load_model

    def load_broken(folder):
        bundle = load_model(folder)
        bundle.model.get_parameter(part).data.fill_(torch.nan)
        return bundle

    monkeypatch.setattr(RunFolder, "load_model", load_broken)
    with pytest.raises(VlkrError, match=r"differs from the adapted model.* nan"):
        export(run, tmp_path / "out")


def test_a_prediction_that_differs_is_a_difference(run, tmp_path, monkeypatch):
    from vlkr.export.open_clip import ExportedOpenClip

    forward = ExportedOpenClip.logits
    monkeypatch.setattr(ExportedOpenClip, "logits", lambda self, x: -forward(self, x))
    with pytest.raises(VlkrError, match=r"image features 1\.000000, .*same predictions"):
        export(run, tmp_path / "out")


def test_compared_images_are_spread_over_the_classes(colors):
    from vlkr.datasets import load_dataset

    dataset = load_dataset(colors)
    found = parity.spread_images(dataset, 4)
    assert len(found) == 4
    shades = {
        max(range(3), key=image.resize((1, 1)).getpixel((0, 0)).__getitem__) for image in found
    }
    assert shades == {0, 1, 2}
    images = sum(1 for _ in dataset.source("test"))
    assert [len(parity.spread_images(dataset, n)) for n in (1, images - 1, 64)] == [
        1,
        images - 1,
        images,
    ]


def test_open_clip_export_is_a_model_like_any_other(run, colors, tmp_path, capsys):
    export(run, tmp_path / "out")
    arguments = ["evaluate", "--model", str(tmp_path / "out"), "--datasets", str(colors), "--json"]
    assert main(arguments) == 0
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    home = json.loads((run / "metrics.json").read_text())["results"][0]["metrics"]
    assert metrics == pytest.approx(home, abs=1e-4)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert type(model) is open_clip.CLIP


# Preprocessing


@pytest.mark.parametrize(
    ("mode", "crop_mode", "size"),
    [
        ("shortest", "center", (32, 32)),
        ("squash", "squash", (32, 32)),
        ("squash", "squash", (32, 24)),
    ],
)
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
def test_transform_is_that_of_timm(mode, crop_mode, size, crop_pct):
    preprocessing = Preprocessing(
        size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", mode, crop_pct=crop_pct
    )
    assert preprocessing.timm()["crop_mode"] == crop_mode
    theirs = timm.data.create_transform(**preprocessing.timm(), is_training=False)
    noise = np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8)
    image = Image.fromarray(noise)
    assert torch.equal(preprocessing.transform()(image), theirs(image))
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(run, tmp_path, monkeypatch):
    from vlkr.export import onnx as writer

    monkeypatch.setattr(writer, "_LARGE", 0)
    export(run, tmp_path / "out", format="onnx")
    names = {path.name for path in (tmp_path / "out").glob("*.data")}
    assert names == {f"{name}.onnx.data" for name in writer.INPUTS}
    assert (tmp_path / "out" / "text_encoder.onnx").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"interpolation": "random"}, True),
        ({"interpolation": "lanczos"}, False),
        ({"resize_mode": "longest", "crop_pct": 0.9}, False),
        ({"resize_mode": "shortest", "crop_pct": 0.9, "size": (16, 8)}, False),
    ],
)
def test_preprocessing_that_nobody_has_words_for(changes, known, small):
    bundle = load_clip(small)
    bundle.preprocess_cfg |= changes
    if known:
        assert Preprocessing.of(bundle).interpolation == "bicubic"
    else:
        with pytest.raises(VlkrError, match="unsupported resize settings for export"):
            Preprocessing.of(bundle)


def test_a_run_on_the_line_to_its_base_keeps_its_strength(run, tmp_path):
    interpolate(run, shifts=False, alphas=[0.25], save="0.25", output=tmp_path / "quarter")
    weights = []
    for name, source, alpha in (("0", run, 0), ("1", run, 1), ("q", tmp_path / "quarter", 1)):
        export(source, tmp_path / name, alpha=alpha)
        weights.append(load_file(tmp_path / name / "open_clip_model.safetensors"))
    base, whole, quarter = weights
    for key in base:
        expected = base[key] + 0.25 * (whole[key] - base[key])
        torch.testing.assert_close(quarter[key], expected, atol=1e-6, rtol=1e-5)
    assert any((whole[key] - quarter[key]).abs().max() > 1e-4 for key in base)
    card = (tmp_path / "q" / "README.md").read_text()
    assert "| adapter's strength (alpha) | 0.25 |" in card
    assert "top-1" not in card.split("---")[1]  # it was not measured at this strength


def test_the_card_names_the_data_and_what_was_drawn(small, colors, tmp_path):
    place = f"digits={resource('data/digits')}"
    data = DataOptions(place, fraction=0.1, batch_size=8, min_steps_per_epoch=1)
    run = small_run(tmp_path / "run", small, colors, data=data).output
    export(run, tmp_path / "out", format="adapter")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(resource("data/digits")) not in card
    assert "| data | digits, fraction 0.1, seed 1 |" in card
    assert "| data licence | CC BY 4.0 |" in card
    manifest = json.loads((tmp_path / "out" / "vlkr_export.json").read_text())
    assert manifest["data"] == {"name": "digits", "fraction": 0.1, "seed": 1}
