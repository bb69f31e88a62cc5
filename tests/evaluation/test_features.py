import dataclasses
import io
import json

import open_clip
import pytest
import torch
from helpers import color_image, write_images
from PIL import Image

import vlkr
from vlkr.datasets import load_dataset
from vlkr.evaluation import evaluate, features
from vlkr.evaluation.evaluate import evaluate_model
from vlkr.evaluation.features import image_features
from vlkr.models.clip import load_clip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch):
    """The number of images of each call of the image tower."""
    calls = []
    plain = features.encode_image

    def encode_image(model, images):
        calls.append(len(images))
        return plain(model, images)

    monkeypatch.setattr(features, "encode_image", encode_image)
    return calls


@pytest.mark.parametrize("options", [{}, {"batch_size": 5}, {"num_workers": 2, "cache": False}])
def test_equals_open_clip(small, colors, options):
    dataset = load_dataset(colors)
    found = image_features(load_clip(small), dataset, "train", **options)
    samples = {sample.key: sample for sample in dataset.source("train")}
    assert sorted(found.keys) == sorted(samples)
    assert found.labels.tolist() == [samples[key].label for key in found.keys]
    assert found.domains == [None] * len(samples)
    model, _, preprocess = open_clip.create_model_and_transforms(small)
    images = [preprocess(Image.open(io.BytesIO(samples[key].image))) for key in found.keys]
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack(images), normalize=True)
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)


def shifted_mean(bundle):
    bundle.preprocess_cfg = {**bundle.preprocess_cfg, "mean": (0, 0, 0)}


def change_visual_weight(bundle):
    bundle.model.visual.proj.data[0, 0] += 1


def change_text_weight(bundle):
    bundle.model.text_projection.data[0, 0] += 1


def test_features_are_encoded_once_unless_what_they_depend_on_changes(small, tmp_path, encoded):
    root = write_images(tmp_path / "d", per_class=2, splits=["train", "test"])

    def features_and_calls(change=None, split="test", **options):
        bundle = load_clip(small)
        if change is not None:
            change(bundle)
        encoded.clear()
        return image_features(bundle, load_dataset(root), split, **options), len(encoded)

    first, calls = features_and_calls()
    assert calls > 0
    again, calls = features_and_calls(batch_size=3)
    assert calls == 0
    assert again.keys == first.keys
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.labels, first.labels)
    assert features_and_calls(change_text_weight)[1] == 0
    assert features_and_calls(cache=False)[1] > 0
    assert features_and_calls(split="train")[1] > 0
    assert features_and_calls(change_visual_weight)[1] > 0
    assert features_and_calls(shifted_mean)[1] > 0
    (root / "test" / "red" / "0.png").write_bytes(color_image("red", 77))
    assert features_and_calls()[1] > 0


@pytest.mark.parametrize(("tower", "files"), [("text", 1), ("visual", 0)])
def test_adapted_image_towers_are_not_cached(small, colors, folder, tower, files):
    bundle = load_clip(small)
    vlkr.add_adapters(bundle.model, "lora", towers=(tower,), rank=2)
    image_features(bundle, load_dataset(colors), "test")
    addresses = [json.loads(path.read_text())["address"] for path in folder.glob("*.json")]
    assert sum(address.startswith("image_features/") for address in addresses) == files


def test_evaluation_from_the_cache_is_the_same(small, colors, monkeypatch):
    bundle, dataset = load_clip(small), load_dataset(colors)
    plain = evaluate_model(bundle, [dataset])
    first = evaluate_model(bundle, [dataset], cache=True)

    def never(*args, **kwargs):
        raise AssertionError("it was to come from the cache")

    monkeypatch.setattr(features, "encode_image", never)
    monkeypatch.setattr(evaluate, "class_embeddings", never)
    again = evaluate_model(bundle, [dataset], cache=True)
    assert again.results == first.results == plain.results


def test_class_embeddings_are_recomputed_when_what_they_depend_on_changes(
    small, colors, monkeypatch
):
    bundle, dataset = load_clip(small), load_dataset(colors)
    made = []
    plain = evaluate.class_embeddings
    monkeypatch.setattr(
        evaluate, "class_embeddings", lambda *a, **k: made.append(1) or plain(*a, **k)
    )

    def is_computed(**changes):
        made.clear()
        evaluate_model(bundle, [dataclasses.replace(dataset, **changes)], cache=True)
        return bool(made)

    vlkr.add_adapters(bundle.model, "lora", towers=("text",), rank=2)
    assert is_computed()  # the adapter is still zero
    assert is_computed(class_names=("azure", "green", "red"))
    assert is_computed(templates=("{c}",))
    for parameter in vlkr.adapter_parameters(bundle.model):
        parameter.data.normal_()
    assert is_computed()
    vlkr.set_adapter_scale(bundle.model, 0.5)
    assert is_computed()
    vlkr.set_adapter_scale(bundle.model, 0)  # the base model's are cached already
    assert not is_computed()
    vlkr.set_adapter_scale(bundle.model, 2)
    vlkr.merge_and_unload(bundle.model)
    assert is_computed()
