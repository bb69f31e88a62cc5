import json
import logging
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import MODEL, color_image, write_clip
from safetensors.torch import load_file, save_file

from vlkr.datasets import Sample
from vlkr.datasets.images import decode_image
from vlkr.errors import VlkrError
from vlkr.models.clip import (
    encode_image,
    encode_text,
    image_size,
    load_clip,
    logit_scale,
    save_open_clip_folder,
)
from vlkr.models.names import absolute_names
from vlkr.runtime import pick_device

TEXTS = ["red", "a photo of a green thing.", "a very long text " * 20]


@pytest.fixture(scope="session")
def bundle(small):
    return load_clip(small)


@pytest.fixture(scope="session")
def plain(small):
    model, _, preprocess = open_clip.create_model_and_transforms(small)
    return model.eval(), preprocess, open_clip.get_tokenizer(small)


def image():
    return decode_image(Sample("k", color_image("red", 0), 0))


def folder_of(name):
    return Path(name.removeprefix("local-dir:"))


def test_loads_what_open_clip_loads(bundle, plain, small):
    model, preprocess, tokenizer = plain
    on_disk = load_file(folder_of(small) / "open_clip_model.safetensors")
    state = bundle.model.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in on_disk.items())
    assert torch.equal(bundle.preprocess(image()), preprocess(image()))
    assert torch.equal(bundle.tokenizer(TEXTS), tokenizer(TEXTS))
    assert not bundle.model.training
    assert (bundle.name, bundle.pretrained) == (small, None)
    assert image_size(bundle) == (16, 16)


def test_encoders_are_open_clips_normalised(bundle, plain):
    model, preprocess, tokenizer = plain
    images, tokens = preprocess(image())[None], tokenizer(TEXTS)
    with torch.no_grad():
        expected = F.normalize(model.encode_image(images), dim=-1)
        torch.testing.assert_close(encode_image(bundle.model, images), expected)
        expected = F.normalize(model.encode_text(tokens), dim=-1)
        torch.testing.assert_close(encode_text(bundle.model, tokens), expected)
    assert logit_scale(bundle.model).item() == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize(
    "architecture", ["CLIP", "CustomTextCLIP", "CustomTextCLIP with a cls token"]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool_type": "last"},
        {"pool_type": "first"},
        {"pool_type": "eos", "eos_id": 49407},
        {"no_causal_mask": True},
    ],
    ids=str,
)
def test_cutting_off_the_padding_changes_no_text_feature(architecture, options, plain):
    config = json.loads(json.dumps(MODEL))
    config["text_cfg"] |= options | {"embed_cls": architecture.endswith("cls token")}
    model = getattr(open_clip, architecture.split()[0])(**config).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = plain[2](TEXTS[:2])
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(encode_text(model, tokens), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_folder_needs_no_schema(small, bundle, monkeypatch):
    folder = folder_of(small)
    assert load_clip(str(folder)).weights_hash == bundle.weights_hash
    monkeypatch.chdir(folder.parent)
    assert load_clip(f"local-dir:{folder.name}").weights_hash == bundle.weights_hash
    assert absolute_names(folder.name, None) == (small, None)
    assert absolute_names(f"local-dir:{folder.name}", None) == (small, None)


def test_names_that_are_no_paths_stay():
    assert absolute_names("tiny", None) == ("tiny", None)
    assert absolute_names("ViT-B-32", "openai") == ("ViT-B-32", "openai")
    assert absolute_names("hf-hub:org/repo", None) == ("hf-hub:org/repo", None)


def test_hash_tells_weights_apart(tmp_path, bundle):
    assert load_clip(write_clip(tmp_path / "same")).weights_hash == bundle.weights_hash
    other = load_clip(write_clip(tmp_path / "other", seed=1))
    assert other.weights_hash != bundle.weights_hash
    assert other.weights_hash[:12] in other.label


def test_architecture_with_weights_from_a_path(tmp_path, small, bundle):
    config = json.loads((folder_of(small) / "open_clip_config.json").read_text())
    (tmp_path / "vlkr-test.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(tmp_path / "vlkr-test.json")
    weights = folder_of(small) / "open_clip_model.safetensors"
    loaded = load_clip("vlkr-test", str(weights))
    assert loaded.weights_hash == bundle.weights_hash
    assert loaded.pretrained == str(weights)
    # Without a preprocessing of its own it is CLIP's.
    assert loaded.preprocess_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN
    with pytest.raises(VlkrError, match="'vlkr-test' needs its weights named by --pretrained"):
        load_clip("vlkr-test")


def test_saved_folder_loads_in_open_clip_as_the_same(tmp_path, bundle, plain):
    save_open_clip_folder(bundle, tmp_path, bundle.model.state_dict())
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    for key, value in plain[0].state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert torch.equal(preprocess(image()), plain[1](image()))
    assert load_clip(f"local-dir:{tmp_path}").model_cfg == bundle.model_cfg


@pytest.mark.parametrize(("tag", "quick_gelu"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_quick_gelu_follows_from_the_tag(monkeypatch, tag, quick_gelu):
    seen = {}

    def create(*args, **kwargs):
        seen.update(kwargs)
        raise OSError("stop here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(VlkrError, match=rf"cannot load model 'ViT-B-32' with .*{tag}.*stop here"):
        load_clip("ViT-B-32", tag)
    assert seen["force_quick_gelu"] is quick_gelu


def test_loading_leaves_the_log_levels(small):
    loggers = [logging.root, logging.getLogger("huggingface_hub")]
    before = [logger.level for logger in loggers]
    load_clip(small)
    with pytest.raises(VlkrError):
        load_clip("nothing")
    assert [logger.level for logger in loggers] == before


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-33", None, "unknown model 'ViT-B-33'; did you mean ViT-B-32"),
        ("zzz", None, r"unknown model 'zzz'; see open_clip.list_models\(\)"),
        ("ViT-B-32", None, "needs its weights named by --pretrained: a path, or one of openai"),
        ("ViT-B-32", "openia", "'openia' is neither a file nor a tag of ViT-B-32; tags: openai"),
        ("ViT-B/32", "openia", "'openia' is neither a file nor a tag"),
        ("local-dir:/nowhere", None, "no open_clip model at /nowhere"),
    ],
)
def test_names_that_are_unknown(name, pretrained, message):
    with pytest.raises(VlkrError, match=message):
        load_clip(name, pretrained)


def test_a_folder_brings_its_weights(small):
    with pytest.raises(VlkrError, match="brings its weights, drop --pretrained 'openai'"):
        load_clip(small, "openai")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def rename_a_tensor(path):
    tensors = load_file(path)
    tensors["other"] = tensors.pop("visual.proj")
    save_file(tensors, path)


def shrink_a_tensor(path):
    save_file(load_file(path) | {"visual.proj": torch.zeros(2, 2)}, path)


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("open_clip_model.safetensors", Path.unlink, "no weights in"),
        ("open_clip_model.safetensors", cut, "cannot load model"),
        ("open_clip_model.safetensors", rename_a_tensor, r"cannot load model.*visual\.proj"),
        ("open_clip_model.safetensors", shrink_a_tensor, r"cannot load model.*visual\.proj"),
        ("open_clip_config.json", cut, "cannot load model"),
        ("open_clip_config.json", lambda p: p.write_text('{"model_cfg": {}}'), "cannot load model"),
        ("open_clip_config.json", lambda p: p.write_text("{}"), "cannot load model"),
    ],
)
def test_damaged_folders(tmp_path, small, file, harm, message):
    shutil.copytree(folder_of(small), tmp_path / "clip")
    harm(tmp_path / "clip" / file)
    with pytest.raises(VlkrError, match=message) as raised:
        load_clip(str(tmp_path / "clip"))
    assert "\n" not in str(raised.value)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(VlkrError, match="device 'gpu' is not available, try 'cpu' or 'auto'"):
        pick_device("gpu")
    with pytest.raises(VlkrError, match="device 'cuda:99' is not available"):
        pick_device("cuda:99")
