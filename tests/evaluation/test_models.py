import dataclasses
import io
import tarfile

import open_clip
import pytest
import torch
import yaml
from helpers import ROOT, write_images, write_shards
from PIL import Image
from sklearn.metrics import roc_auc_score

from vlkr.adapters.hosts import weights_hash
from vlkr.datasets import load_dataset
from vlkr.datasets.samples import View
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate_model
from vlkr.evaluation.features import evaluation_mode
from vlkr.models.clip import load_clip
from vlkr.runs import RunFolder


def read_card(name):
    """Card, images and labels of a dataset that ships, without vlkr."""
    card = yaml.safe_load((ROOT / "data" / f"{name}.yaml").read_text())
    images, labels = {}, {}
    for path in (ROOT / "data" / name / "test").glob("*.tar"):
        with tarfile.open(path) as archive:
            for entry in archive:
                key, extension = entry.name.split(".")
                content = archive.extractfile(entry).read()
                if extension == "cls":
                    labels[key] = int(content)
                else:
                    images[key] = Image.open(io.BytesIO(content)).convert("RGB")
    return card, [images[key] for key in labels], torch.tensor(list(labels.values()))


@pytest.mark.parametrize("name", ["digits", "digits-fonts"])
def test_equals_a_plain_open_clip_loop(small, name):
    card, images, labels = read_card(name)
    model, _, preprocess = open_clip.create_model_and_transforms(small)
    tokenizer = open_clip.get_tokenizer(small)
    templates = [lambda c, t=t: t.replace("{c}", c) for t in card["templates"]]
    model.eval()
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            model, tokenizer, card["class_names"], templates
        )
        features = model.encode_image(torch.stack([preprocess(image) for image in images]))
        features = features / features.norm(dim=1, keepdim=True)
        logits = model.logit_scale.exp() * features @ classifier
    result = evaluate_model(load_clip(small), [load_dataset(name)]).in_distribution
    assert result.images == len(labels) == card["splits"]["test"]
    predicted = logits.argmax(1)
    assert result.metrics["acc1"] == pytest.approx(
        (predicted == labels).double().mean().item(), abs=1e-6
    )
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert result.metrics["acc5"] == pytest.approx(top5, abs=1e-6)
    recall = torch.stack([(predicted == c)[labels == c].double().mean() for c in labels.unique()])
    assert result.metrics["mean_per_class_recall"] == pytest.approx(recall.mean().item(), abs=1e-6)
    nll = torch.nn.functional.cross_entropy(logits, labels).item()
    assert result.metrics["nll"] == pytest.approx(nll, abs=1e-5)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"batch_size": 5}])
def test_workers_and_batches_change_no_digit(small, colors, options):
    dataset, bundle = load_dataset(colors), load_clip(small)
    expected = evaluate_model(bundle, [dataset]).in_distribution
    found = evaluate_model(bundle, [dataset], **options).in_distribution
    assert found.images == expected.images
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-5)


def test_adapters_are_merged_for_the_evaluation_and_restored_after_it(run, small, colors):
    bundle = RunFolder.open(run).load_model()
    base = load_clip(small)
    found = evaluate_model(bundle, [load_dataset(colors)])
    plain = evaluate_model(base, [load_dataset(colors)])
    assert found.in_distribution.metrics != plain.in_distribution.metrics
    with evaluation_mode(bundle, "cpu") as model:
        assert weights_hash(model.module) != base.weights_hash
    assert weights_hash(bundle.model) == base.weights_hash
    assert evaluate_model(bundle, [load_dataset(colors)]).in_distribution == found.in_distribution


def test_predictions_are_kept_when_asked(small, colors):
    bundle, dataset = load_clip(small), load_dataset(colors)
    assert evaluate_model(bundle, [dataset]).in_distribution.predictions is None
    home = evaluate_model(bundle, [dataset], keep_predictions=True).in_distribution
    samples = sorted(dataset.source("test"), key=lambda sample: sample.key)
    assert home.predictions.keys == [sample.key for sample in samples]
    assert home.predictions.labels == [sample.label for sample in samples]
    images = torch.stack([bundle.preprocess(Image.open(io.BytesIO(s.image))) for s in samples])
    names = dataset.class_names
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            bundle.model, bundle.tokenizer, names, ["a photo of a {}."]
        )
        features = bundle.model.encode_image(images, normalize=True)
        expected = (bundle.model.logit_scale.exp() * features @ classifier).softmax(1)
    confidence = torch.tensor(home.predictions.confidence)
    torch.testing.assert_close(confidence, expected.amax(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(home.predictions.predicted), expected.argmax(1))
    assert torch.tensor(home.confusion).sum() == home.images == len(samples)
    assert home.class_names == names


def test_images_of_unknown_classes(small, colors, tmp_path):
    bundle, home = load_clip(small), load_dataset(colors)
    unknown = [load_dataset(write_images(tmp_path / name, 4)) for name in ("a", "b")]
    found = evaluate_model(bundle, [home], unknown=unknown)
    assert found.context["unknown"].startswith("a (")

    def confidences(datasets):
        results = [evaluate_model(bundle, [d], keep_predictions=True) for d in datasets]
        return [c for r in results for c in r.in_distribution.predictions.confidence]

    # The unknown datasets have the same class names, so their confidences are comparable.
    known, other = confidences([home]), confidences(unknown)
    expected = roc_auc_score([1] * len(known) + [0] * len(other), known + other)
    assert found.in_distribution.metrics["auroc"] == pytest.approx(expected, abs=1e-4)
    assert "auroc" not in evaluate_model(bundle, [home]).in_distribution.metrics


def test_accuracy_by_domain(small, tmp_path):
    for i, name in enumerate(("art", "photo", "sketch")):
        write_images(tmp_path / name, per_class=6 + 2 * i)
    bundle, dataset = load_clip(small), load_dataset(tmp_path)
    found = evaluate_model(bundle, [dataset], keep_predictions=True).in_distribution
    assert list(found.domains) == ["art", "photo", "sketch"]
    accuracies = []
    for name, domain in found.domains.items():
        own = evaluate_model(bundle, [dataset.select(domains=[name])]).in_distribution
        assert domain.images == own.images == found.predictions.domains.count(name)
        assert domain.acc1 == own.metrics["acc1"]
        assert "mean_domain_acc1" not in own.metrics
        accuracies.append(domain.acc1)
    mean = sum(accuracies) / 3
    assert found.metrics["mean_domain_acc1"] == pytest.approx(mean, abs=1e-6)
    assert found.metrics["worst_domain_acc1"] == min(accuracies)


def test_at_most_max_bad_images_are_skipped(small, tmp_path):
    root = write_images(tmp_path / "d", per_class=3, splits=["test"])
    for name in ("red", "blue"):
        (root / "test" / name / "1.png").write_bytes(b"garbage")
    bundle, dataset = load_clip(small), load_dataset(root)
    with pytest.raises(VlkrError, match="more than 1 bad samples"):
        evaluate_model(bundle, [dataset], max_bad=1)
    with pytest.warns(UserWarning, match="2 bad samples were skipped"):
        assert evaluate_model(bundle, [dataset], max_bad=2).in_distribution.images == 7


def empty_domain(folder):
    for name in ("art", "photo", "sketch"):
        write_images(folder / "d" / name, per_class=2)
    dataset = load_dataset(folder / "d")
    return dataclasses.replace(dataset.select(domains=["art", "photo"]), domains=dataset.domains)


def duplicate_key(folder):
    shards = write_shards(folder / "d", per_class=2) / "test"
    (shards / "1.tar").write_bytes((shards / "0.tar").read_bytes())
    return load_dataset(folder / "d")


def damaged_shard(folder):
    shard = write_shards(folder / "d") / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    return load_dataset(folder / "d")


def missing_sample(folder):
    return dataclasses.replace(load_dataset("digits-fonts"), sizes={"test": 161})


def empty_split(folder):
    dataset = load_dataset(write_images(folder / "d"))
    return dataclasses.replace(dataset, splits={"test": View(dataset.source("test"), times={})})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_domain, "domain 'sketch' is empty"),
        (duplicate_key, "'d' has the key 's0_0' 2 times in its split 'test'"),
        (damaged_shard, r"cannot read shard .*test/1\.tar"),
        (missing_sample, r"'digits-fonts' has 160 images .* expected 161"),
        (empty_split, "has no images in its split 'test'"),
    ],
)
def test_datasets_that_are_not_complete(make, message, small, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts to read a shard
    with pytest.raises(VlkrError, match=message):
        evaluate_model(load_clip(small), [make(tmp_path)])


def test_weights_that_are_not_finite_are_reported(small, colors):
    bundle = load_clip(small)
    bundle.model.visual.proj.data[0, 0] = torch.nan
    with pytest.raises(VlkrError, match="logits on colors are not finite"):
        evaluate_model(bundle, [load_dataset(colors)])
