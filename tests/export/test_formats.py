"""What each format writes, what is refused, and the parity check."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import open_clip
import pytest
import timm
import torch
from export.outputs import merged
from helpers import tree
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from vlkr.cli import main
from vlkr.datasets import load_dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.interpolation import interpolate
from vlkr.export import onnx as onnx_module
from vlkr.export import open_clip as open_clip_module
from vlkr.export import parity
from vlkr.export.export import export
from vlkr.export.formats import Preprocessing
from vlkr.export.hf_clip import write_tokenizer
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


@pytest.fixture(scope="module")
def base(small):
    """The base model's weights."""
    return load_file(Path(small.removeprefix("local-dir:")) / "open_clip_model.safetensors")


def weights_of(folder, name="open_clip_model"):
    return load_file(folder / f"{name}.safetensors")


# What each format writes


@pytest.mark.parametrize("name", ["open_clip", "transformers", "adapter", "timm", *TRACED])
def test_writes_its_files_and_compares_itself(name, run, vit_run, exported):
    source = vit_run if name == "timm" else run
    result = exported(source, name)
    assert set(tree(result.folder)) == COMMON | FILES[name]
    manifest = json.loads((result.folder / "vlkr_export.json").read_text())
    assert result.to_json()["parity"] == manifest["parity"]
    assert (manifest["format"], manifest["dtype"]) == (name, "float32")
    assert manifest["parity"]["images"] == (64 if name == "timm" else 19)
    assert manifest["parity"]["same_predictions"] == 1
    assert manifest["parity"]["min_image_cosine"] >= 0.99999
    assert (manifest["parity"]["min_text_cosine"] is None) == (name == "timm")
    assert manifest["base_sha256"] == RunFolder.open(source).load_model().weights_hash
    assert manifest["adapter"]["name"] == "kradapter"


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), *HALF.items()])
def test_weights_are_merged_in_fp32_and_then_cast(dtype, torch_dtype, run, base, exported):
    result = exported(run, dtype=dtype)
    assert result.parity.bound == (0.99999 if dtype == "float32" else 0.999)
    weights, state = weights_of(result.folder), merged(run).model.state_dict()
    assert set(base) <= set(weights)
    for key, tensor in weights.items():
        expected = state[key] if state[key].numel() == 1 else state[key].to(torch_dtype)
        assert tensor.dtype is expected.dtype
        assert torch.equal(tensor, expected), key
    # Only the weights of adapted layers change.
    changed = {k for k, t in base.items() if not torch.equal(weights[k], t.to(weights[k].dtype))}
    assert {key.rsplit(".", 1)[-1] for key in changed} == {"in_proj_weight", "weight"}
    assert not {key for key in changed if "ln" in key or "embedding" in key or "conv" in key}


@pytest.mark.parametrize(
    ("name", "dtype"), [("timm", "float16"), ("transformers", "float16"), ("adapter", "bfloat16")]
)
def test_half_precision_is_stored(dtype, name, run, vit_run, exported):
    result = exported(vit_run if name == "timm" else run, name, dtype)
    assert result.parity.min_image_cosine >= 0.999
    weights = weights_of(result.folder, "adapter_model" if name == "adapter" else "model")
    assert {tensor.dtype for tensor in weights.values() if tensor.numel() > 1} == {HALF[dtype]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_graphs(dtype, run, exported):
    results = {name: exported(run, name, dtype) for name in ("torch", "onnx")}
    for result in results.values():
        assert min(result.parity.min_image_cosine, result.parity.min_text_cosine) >= 0.999
    program = torch.export.load(results["torch"].folder / "image_encoder.pt2")
    assert {tensor.dtype for tensor in program.state_dict.values()} == {HALF[dtype]}
    stored = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
    for name in ("image_encoder", "text_encoder", "classifier"):
        graph = onnx.load(results["onnx"].folder / f"{name}.onnx").graph
        dtypes = {t.data_type for t in graph.initializer if t.dims and max(t.dims) > 1}
        assert dtypes - {onnx.TensorProto.INT64} == {stored[dtype]}
        types = {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
        assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.slow
def test_graphs_hold_no_pickle_and_no_weights_of_the_other_tower(run, exported):
    state = merged(run).model.state_dict()
    for name in ("image_encoder", "text_encoder"):
        path = exported(run, "torch").folder / f"{name}.pt2"
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        assert not [f for f, size in sizes.items() if f.endswith((".pkl", ".pt")) and size]
        is_image = name == "image_encoder"
        own = sum(t.numel() for t in torch.export.load(path).state_dict.values())
        expected = sum(t.numel() for k, t in state.items() if k.startswith("visual.") == is_image)
        assert abs(own - expected) <= 1  # the logit scale


@pytest.mark.slow
def test_large_weights_are_stored_beside_the_graph(run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_module, "_LARGE", 0)
    export(run, tmp_path / "out", format="onnx")
    names = {path.name for path in (tmp_path / "out").glob("*.data")}
    assert names == {f"{name}.onnx.data" for name in onnx_module.GRAPHS}
    assert (tmp_path / "out" / "text_encoder.onnx").stat().st_size < 300_000


def test_alpha_scales_the_weight_update(run, base, tmp_path, exported):
    """Also that of a run that interpolation saved at a quarter of its strength."""
    interpolate(run, include_shifts=False, alphas=[0.25], save="0.25", output=tmp_path / "quarter")
    adapted = merged(run).model.state_dict()
    quarter = exported(tmp_path / "quarter")
    for folder in (exported(run, alpha=0.25).folder, quarter.folder):
        weights = weights_of(folder)
        for key, tensor in base.items():
            expected = tensor + 0.25 * (adapted[key] - tensor)
            torch.testing.assert_close(weights[key], expected, atol=1e-6, rtol=1e-5)
    assert any((adapted[key] - weights[key]).abs().max() > 1e-4 for key in base)
    unadapted = weights_of(exported(run, alpha=0).folder)
    assert all(torch.equal(unadapted[key], tensor) for key, tensor in base.items())
    card = (quarter.folder / "README.md").read_text()
    assert "| adapter's strength (alpha) | 0.25 |" in card
    assert "top-1" not in card.split("---")[1]  # it was not evaluated at this strength


def test_onnx_tokenizer_gives_the_same_ids(small, tmp_path):
    bundle = load_clip(small)
    write_tokenizer(bundle, tmp_path)
    texts = ["a photo of a red square.", "Don't  SHOUT, 42 naïve cafés!", "", "日本 😀"]
    texts.append("long " * 40)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    assert ids == bundle.tokenizer(texts).tolist()


def test_open_clip_export_is_a_model_like_any_other(run, colors, exported, capsys):
    folder = exported(run).folder
    assert main(["evaluate", f"--model={folder}", f"--datasets={colors}", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    of_run = json.loads((run / "metrics.json").read_text())["results"][0]["metrics"]
    assert metrics == pytest.approx(of_run, abs=1e-4)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert type(model) is open_clip.CLIP


# What is refused, and what is kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format onxx", "unknown format 'onxx'; known: open_clip, timm, transformers, onnx"),
        ("--dtype int8", "unknown dtype 'int8'; known: float32, float16, bfloat16"),
        ("--alpha -1", "alpha -1.0 is out of range, expected at least 0; 0 is the base"),
        ("--alpha inf", "alpha inf is out of range"),
        ("--push-to-hub a/b/c", "'a/b/c' is not a repository, expected ORG/NAME"),
        ("--output FOLDER/thesis --force", "does not hold an export; --force replaces nothing"),
        ("--output FOLDER/thesis", "exists already; name another folder, or --force"),
        ("--output FOLDER/thesis/tex --force", "tex is a file, expected a folder"),
        ("--output FOLDER/thesis/tex/inside --force", "tex is a file"),
    ],
)
def test_wrong_options_are_one_line(options, message, run, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "tex").write_text("years of work")
    before = tree(tmp_path)
    words = options.replace("FOLDER", str(tmp_path)).split()
    words += [] if "--output" in words else [f"--output={tmp_path / 'out'}"]
    assert main(["export", f"--run={run}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("name", "missing"), [("onnx", "onnxruntime"), ("transformers",) * 2])
def test_a_library_that_is_not_installed_is_named(name, missing, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"vlkr.export.{name}", raising=False)
    with pytest.raises(VlkrError, match=rf"needs {missing}, .* pip install 'vlkr\[export\]'"):
        export(run, tmp_path / "out", format=name)
    assert tree(tmp_path) == {}


def test_an_export_is_kept_unless_forced(run, tmp_path):
    output = tmp_path / "out"
    export(run, output)
    before = tree(output)
    with pytest.raises(VlkrError, match="exists already; name another folder, or --force"):
        export(run, output)
    assert tree(output) == before
    export(run, output, force=True)
    assert tree(output) == before
    export(run, output, format="adapter", force=True)
    assert "open_clip_config.json" not in tree(output)


@pytest.mark.parametrize("name", ["open_clip", "transformers", *TRACED])
def test_a_full_disk_keeps_the_old_export(name, run, exported, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        shutil.copytree(exported(run, "adapter").folder, disk / "out")
        (disk / "filler").write_bytes(bytes(2 * 2**20))
        before = tree(disk)
        for output in (disk / "out", disk / "new"):
            words = [f"--run={run}", f"--format={name}", f"--output={output}", "--force"]
            assert main(["export", *words]) == 2
            assert f"vlkr: error: cannot write {output}" in capsys.readouterr().err
            assert tree(disk) == before
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# The parity check


def _spoil_weights(monkeypatch):
    save = open_clip_module.save_open_clip_folder

    def save_wrongly(bundle, folder, tensors):
        noise = 0.1 * torch.randn_like(tensors["visual.proj"])
        save(bundle, folder, tensors | {"visual.proj": tensors["visual.proj"] + noise})

    monkeypatch.setattr(open_clip_module, "save_open_clip_folder", save_wrongly)


def _spoil_logits(monkeypatch):
    exported = open_clip_module.ExportedOpenClip
    forward = exported.logits
    monkeypatch.setattr(exported, "logits", lambda self, pixels: -forward(self, pixels))


def _spoil_run(parameter):
    def spoil(monkeypatch):
        load_model = RunFolder.load_model

        def load_broken(folder):
            bundle = load_model(folder)
            bundle.model.get_parameter(parameter).data.fill_(torch.nan)
            return bundle

        monkeypatch.setattr(RunFolder, "load_model", load_broken)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "dtype", "message"),
    [
        (_spoil_weights, "float32", r"least cosine of image features 0\."),
        (_spoil_weights, "float16", r"least cosine of image features 0\."),
        (_spoil_run("visual.proj"), "float32", "image features nan"),
        (_spoil_run("text_projection"), "float32", "text features nan"),
        (_spoil_logits, "float32", r"image features 1\.000000, .*same predictions \d?\d%"),
    ],
)
def test_a_difference_fails_and_leaves_nothing(spoil, dtype, message, run, tmp_path, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(VlkrError, match=f"the export differs from the adapted model.*{message}"):
        export(run, tmp_path / "out", dtype=dtype)
    assert tree(tmp_path) == {}


def test_compared_images_are_spread_over_the_classes(colors):
    dataset = load_dataset(colors)
    images = parity.spread_images(dataset, 4)
    assert len(images) == 4
    means = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
    assert {max(range(3), key=mean.__getitem__) for mean in means} == {0, 1, 2}
    number = sum(1 for _ in dataset.source("test"))
    for count, expected in ((1, 1), (number - 1, number - 1), (64, number)):
        assert len(parity.spread_images(dataset, count)) == expected


# Preprocessing


@pytest.mark.parametrize("mode_and_size", [("shortest", 32), ("squash", 32), ("squash", 24)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
def test_transform_is_that_of_timm(mode_and_size, crop_pct):
    mode, width = mode_and_size
    preprocessing = Preprocessing(
        (32, width), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", mode, crop_pct=crop_pct
    )
    assert preprocessing.timm()["crop_mode"] == {"shortest": "center"}.get(mode, mode)
    theirs = timm.data.create_transform(**preprocessing.timm(), is_training=False)
    noise = np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8)
    image = Image.fromarray(noise)
    assert torch.equal(preprocessing.transform()(image), theirs(image))
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


def test_color_of_the_padding(write_model, make_run, exported, tmp_path):
    clip = write_model(tmp_path / "clip", resize_mode="longest", fill_color=200)
    folder = exported(make_run(tmp_path / "run", clip)).folder
    manifest = json.loads((folder / "vlkr_export.json").read_text())
    theirs = open_clip.create_model_and_transforms(clip)[2]
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    for transform in (
        open_clip.create_model_and_transforms(f"local-dir:{folder}")[2],
        Preprocessing.from_json(manifest["preprocessing"]).transform(),
    ):
        assert torch.equal(transform(image), theirs(image))
    assert len(theirs(image).unique()) > 3


@pytest.mark.parametrize(
    ("changes", "is_known"),
    [
        ({"interpolation": "random"}, True),
        ({"interpolation": "lanczos"}, False),
        ({"resize_mode": "longest", "crop_pct": 0.9}, False),
        ({"resize_mode": "shortest", "crop_pct": 0.9, "size": (16, 8)}, False),
    ],
)
def test_resize_settings_that_no_format_has(changes, is_known, small):
    bundle = load_clip(small)
    bundle.preprocess_cfg |= changes
    if is_known:
        assert Preprocessing.of(bundle).interpolation == "bicubic"
    else:
        with pytest.raises(VlkrError, match="unsupported resize settings for export"):
            Preprocessing.of(bundle)
