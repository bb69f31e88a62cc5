import json
import sys
import zipfile
from pathlib import Path

import onnx
import open_clip
import pytest
import timm
import torch
import transformers
from helpers import tree
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer

from vlkr.adapters import load_adapter, merge_adapters
from vlkr.cli import main
from vlkr.errors import VlkrError
from vlkr.evaluation.runs import load_run
from vlkr.export import exporter, parity
from vlkr.export.exporter import export, load_export
from vlkr.models.clip import load_clip

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
    bundle, _ = load_run(run)
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
    assert manifest["base_sha256"] == load_run(source)[0].weights_hash
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


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["timm", "transformers", "adapter"])
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
    from vlkr.export.tokenizer import write_tokenizer_json

    bundle = load_clip(small)
    write_tokenizer_json(bundle, tmp_path / "tokenizer.json")
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


# Formats that other libraries read


@pytest.mark.parametrize(
    "pool", [("", "linear", False), ("avg", "linear", True), ("token", None, False)]
)
def test_timm_tower_of_a_clip(pool, write_model, make_run, digit_images, tmp_path):
    names = ("timm_pool", "timm_proj", "timm_proj_bias")
    vision = {
        "timm_model_name": "test_vit",
        "image_size": 160,
        **dict(zip(names, pool, strict=True)),
    }
    run = make_run(tmp_path / "run", write_model(tmp_path / "clip", vision_cfg=vision))
    export(run, tmp_path / "out", format="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert list(config["mean"]) == [0.5, 0.4, 0.3]
    preprocess = timm.data.create_transform(**config)
    plain = merged(run)
    pixels = torch.stack([preprocess(image) for image in digit_images[:8]])
    wanted = torch.stack([plain.preprocess(image) for image in digit_images[:8]])
    assert torch.equal(pixels, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), plain.model.encode_image(pixels))
    assert model.num_classes == 24


ARCHITECTURES = {
    "quick_gelu": ({"quick_gelu": True}, ("quick_gelu", "quick_gelu")),
    "tanh": (
        {"text_cfg": {"act_kwargs": {"approximate": "tanh"}}, "resize_mode": "shortest"},
        ("gelu", "gelu_pytorch_tanh"),
    ),
    "custom_text": ({"custom_text": True}, ("gelu", "gelu")),
    "eps": ({"vision_cfg": {"norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 3.0}}, ("gelu", "gelu")),
    "vector_scale": ({"nonscalar_logit_scale": True}, ("gelu", "gelu")),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_of_other_architectures(name, write_model, make_run, digit_images, tmp_path):
    changes, activations = ARCHITECTURES[name]
    clip = write_model(tmp_path / "clip", **changes)
    run = make_run(tmp_path / "run", clip, std=0.1)
    export(run, tmp_path / "out", format="transformers")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.vision_config.hidden_act, config.text_config.hidden_act) == activations
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    images = [image.resize((20, 12)) for image in digit_images[:4]]
    inputs = processor(
        text=["a", "the digit two"], images=images, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**inputs)
        plain = merged(run)
        pixels = torch.stack([plain.preprocess(image) for image in images])
        tokens = plain.tokenizer(["a", "the digit two"])
        features = plain.model.encode_image(pixels, normalize=True)
        texts = plain.model.encode_text(tokens, normalize=True)
        wanted = plain.model.logit_scale.exp() * features @ texts.T
    # The default processor resizes with torchvision, which may round a pixel the other way.
    assert (inputs["pixel_values"] - pixels).abs().max() <= 1.01 / 255 / 0.2
    torch.testing.assert_close(found.text_embeds, texts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits_per_image, wanted, atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16}}, "image tower is a ModifiedResNet"),
        ({"vision_cfg": {"attentional_pool": True}}, "pools by attention"),
        ({"vision_cfg": {"pool_type": "avg"}}, "image tower pools 'avg', expected 'tok'"),
        ({"vision_cfg": {"no_ln_pre": True}}, "vision_model.pre_layrnorm.weight"),
        (
            {"vision_cfg": {"ls_init_value": 0.1}},
            "no place for visual.transformer.resblocks.0.ls_1",
        ),
        ({"vision_cfg": {"qk_norm": True}}, "has blocks CustomResidualAttentionBlock"),
        ({"text_cfg": {"pool_type": "last"}}, "text tower pools 'last', expected 'argmax'"),
        ({"text_cfg": {"no_causal_mask": True}}, "text tower is not causal"),
        ({"text_cfg": {"proj_bias": True}}, "no place for text_projection.weight"),
        ({"init_logit_bias": -10.0}, "no place for logit_bias"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "whitespace"}}}, "CLIP's own tokenizer"),
        ({"resize_mode": "longest"}, "no resize mode 'longest'"),
    ],
)
def test_transformers_refuses_what_it_cannot_hold(
    changes, message, write_model, make_run, tmp_path
):
    run = make_run(tmp_path / "run", write_model(tmp_path / "clip", **changes))
    with pytest.raises(VlkrError) as raised:
        export(run, tmp_path / "out", format="transformers")
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("targets", "options", "alpha"),
    [
        (("q", "k", "v", "out", "fc1", "fc2"), {"rank": 4, "alpha": 2.0}, 1.0),
        (("qkv", "fc1"), {"rank": 3, "use_rslora": True}, 0.5),
    ],
)
def test_lora_for_peft(targets, options, alpha, small, make_run, tmp_path):
    run = make_run(tmp_path / "run", small, adapter="lora", std=0.2, targets=targets, **options)
    export(run, tmp_path / "base", format="transformers", alpha=0)
    export(run, tmp_path / "out", format="adapter", alpha=alpha)
    export(run, tmp_path / "merged", format="transformers", alpha=alpha)
    read = transformers.CLIPModel.from_pretrained
    inputs = {
        "pixel_values": torch.randn(4, 3, 16, 16),
        "input_ids": torch.tensor([[49406, 49407]]),
    }
    found = PeftModel.from_pretrained(read(tmp_path / "base"), tmp_path / "out").eval()
    with torch.no_grad():
        got, wanted, base = (
            model(**inputs) for model in (found, read(tmp_path / "merged"), read(tmp_path / "base"))
        )
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-4)
        assert (base[name] - wanted[name]).abs().max() > 0.01
    bundle = load_clip(small)
    load_adapter(bundle.model, tmp_path / "out")
    with torch.no_grad():
        features = bundle.model.encode_image(inputs["pixel_values"], normalize=True)
    torch.testing.assert_close(features, wanted.image_embeds, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("timm", "small", "image tower of 'local-dir:.*' is a VisionTransformer and no timm model"),
        ("open_clip", "vit", "model 'timm:test_vit' has no text tower, and format open_clip holds"),
        ("transformers", "vit", "has no text tower, and format transformers holds image-text"),
    ],
)
def test_a_model_that_a_format_cannot_hold(name, model, message, run, vit_run, tmp_path):
    with pytest.raises(VlkrError, match=message):
        export(run if model == "small" else vit_run, tmp_path / "out", format=name)
    assert tree(tmp_path) == {}


def test_timm_refuses_more_than_a_linear_head(write_model, make_run, tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_proj": "mlp", "image_size": 160}
    run = make_run(tmp_path / "run", write_model(tmp_path / "clip", vision_cfg=vision))
    with pytest.raises(VlkrError, match="ends in Mlp, and timm's head holds one linear layer"):
        export(run, tmp_path / "out", format="timm")


def test_vit_without_text_as_adapter(vit_run, tmp_path):
    found = export(vit_run, tmp_path / "out", format="adapter").parity
    assert found.min_text_cosine is None
    assert load_export(tmp_path / "out").classifier.class_names[:2] == ("zero", "one")


# Wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format onxx", "unknown format 'onxx'; known: open_clip, timm, transformers, onnx"),
        ("--dtype int8", "unknown dtype 'int8'; known: float32, float16, bfloat16"),
        ("--alpha -1", "alpha -1.0 is out of range, expected 0 (the base) to 1 (adapted)"),
        ("--alpha .inf", "alpha inf is out of range"),
        ("--push-to-hub a/b/c", "'a/b/c' is no repository, expected ORG/NAME"),
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
    for module in ("onnx", "transformers", "tokenizer"):
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
    def load_broken(folder):
        bundle, config = load_run(folder)
        bundle.model.get_parameter(part).data.fill_(torch.nan)
        return bundle, config

    monkeypatch.setattr(exporter, "load_run", load_broken)
    with pytest.raises(VlkrError, match=r"differs from the adapted model.* nan"):
        export(run, tmp_path / "out")


def test_a_prediction_that_differs_is_a_difference(run, tmp_path, monkeypatch):
    from vlkr.export.open_clip import OpenClipPredictor

    forward = OpenClipPredictor.logits
    monkeypatch.setattr(OpenClipPredictor, "logits", lambda self, x: -forward(self, x))
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


def test_open_clip_export_is_a_model_like_any_other(run, colors, tmp_path, capsys):
    export(run, tmp_path / "out")
    arguments = ["evaluate", "--model", str(tmp_path / "out"), "--datasets", str(colors), "--json"]
    assert main(arguments) == 0
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    home = json.loads((run / "metrics.json").read_text())["results"][0]["metrics"]
    assert metrics == pytest.approx(home, abs=1e-4)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert type(model) is open_clip.CLIP
