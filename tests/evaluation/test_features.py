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
from vlkr.errors import VlkrError
from vlkr.evaluation import evaluate, features
from vlkr.evaluation.evaluate import evaluate_model
from vlkr.evaluation.features import fingerprint, image_features
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


def open_clips_features(small, samples):
    model, _, preprocess = open_clip.create_model_and_transforms(small)
    images = [preprocess(Image.open(io.BytesIO(sample.image))) for sample in samples]
    with torch.no_grad():
        return model.eval().encode_image(torch.stack(images), normalize=True)


@pytest.mark.parametrize("options", [{}, {"batch_size": 5}, {"num_workers": 2, "cache": False}])
def test_equals_open_clip(small, colors, options):
    dataset = load_dataset(colors)
    found = image_features(load_clip(small), dataset, "train", **options)
    samples = {sample.key: sample for sample in dataset.source("train")}
    assert sorted(found.keys) == sorted(samples)
    assert found.labels.tolist() == [samples[key].label for key in found.keys]
    assert found.domains == [None] * len(samples)
    expected = open_clips_features(small, [samples[key] for key in found.keys])
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)


def test_encoded_once(small, colors, encoded):
    bundle, dataset = load_clip(small), load_dataset(colors)
    first = image_features(bundle, dataset, "test")
    calls = len(encoded)
    again = image_features(bundle, dataset, "test", batch_size=3)
    assert len(encoded) == calls > 0
    assert again.keys == first.keys
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.labels, first.labels)
    image_features(bundle, dataset, "test", cache=False)
    assert len(encoded) > calls


def test_whatever_the_features_depend_on_counts(small, tmp_path, encoded):
    root = write_images(tmp_path / "d", per_class=2, splits=["test"])

    def is_encoded(change):
        bundle, dataset = load_clip(small), load_dataset(root)
        bundle, dataset = change(bundle, dataset)
        before = len(encoded)
        image_features(bundle, dataset, "test")
        return len(encoded) > before

    def weights(bundle, dataset):
        bundle.model.visual.proj.data[0, 0] += 1
        return bundle, dataset

    def preprocessing(bundle, dataset):
        return dataclasses.replace(
            bundle, preprocess_cfg={**bundle.preprocess_cfg, "mean": (0, 0, 0)}
        ), dataset

    def image(bundle, dataset):
        (root / "test" / "red" / "0.png").write_bytes(color_image("red", 77))
        return bundle, dataset

    def text(bundle, dataset):
        bundle.model.text_projection.data[0, 0] += 1
        return bundle, dataset

    assert is_encoded(lambda *same: same)
    assert not is_encoded(lambda *same: same)
    assert not is_encoded(text)
    for change in (weights, preprocessing, image):
        assert is_encoded(change), change.__name__


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


@pytest.mark.parametrize("change", ["adapter", "scale", "merged", "names", "templates"])
def test_class_embeddings_of_another_kind_are_made_anew(small, colors, monkeypatch, change):
    bundle, dataset = load_clip(small), load_dataset(colors)
    made = []
    plain = evaluate.class_embeddings
    monkeypatch.setattr(
        evaluate, "class_embeddings", lambda *a, **k: made.append(1) or plain(*a, **k)
    )
    vlkr.add_adapters(bundle.model, "lora", towers=("text",), rank=2)
    evaluate_model(bundle, [dataset], cache=True)  # the adapter is zero as yet
    assert len(made) == 1
    if change in ("adapter", "merged", "scale"):
        for parameter in vlkr.adapter_parameters(bundle.model):
            parameter.data.normal_()
    if change == "scale":
        evaluate_model(bundle, [dataset], cache=True)
        made.clear()
        vlkr.set_adapter_scale(bundle.model, 0.5)
        evaluate_model(bundle, [dataset], cache=True)
        assert len(made) == 1
        vlkr.set_adapter_scale(bundle.model, 0)  # the base, which was there before
        evaluate_model(bundle, [dataset], cache=True)
        assert len(made) == 1
        return
    if change == "merged":
        vlkr.merge_and_unload(bundle.model)
    if change == "names":
        dataset = dataclasses.replace(dataset, class_names=("azure", "green", "red"))
    if change == "templates":
        dataset = dataclasses.replace(dataset, templates=("{c}",))
    evaluate_model(bundle, [dataset], cache=True)
    assert len(made) == 2


def test_fingerprint(colors, tmp_path):
    dataset = load_dataset(colors)
    assert fingerprint(dataset.source("test")) == fingerprint(load_dataset(colors).source("test"))
    assert fingerprint(dataset.source("test")) != fingerprint(dataset.source("train"))


def test_split_that_is_not_there(small, colors):
    with pytest.raises(VlkrError, match="has no split 'val'"):
        image_features(load_clip(small), load_dataset(colors), "val")
