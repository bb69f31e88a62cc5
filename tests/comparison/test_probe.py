"""The linear probe against scikit-learn on the same features."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from grids import compare
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression

from vlkr.comparison.cell import STRENGTHS, fit_probe, probe_logits
from vlkr.datasets import few_shot_split
from vlkr.datasets.samples import View
from vlkr.errors import VlkrError
from vlkr.evaluation.features import Features, image_features
from vlkr.files import read_json
from vlkr.models.clip import load_clip


def features(x, labels):
    return Features(
        [str(i) for i in range(len(labels))],
        torch.tensor(labels),
        [None] * len(labels),
        torch.tensor(x, dtype=torch.float32),
    )


def test_chooses_the_strength_that_validates_best():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 90)
    x = np.eye(3)[labels] + generator.normal(0, 0.8, (90, 3))
    train, val = features(x[:30], labels[:30]), features(x[30:], labels[30:])
    probe, strength, accuracy = fit_probe(train, val)
    scores = []
    for c in STRENGTHS:
        plain = LogisticRegression(C=c, max_iter=5000).fit(
            train.features.double().numpy(), labels[:30]
        )
        scores.append(plain.score(val.features.double().numpy(), labels[30:]))
    assert len(set(scores)) > 1
    assert accuracy == pytest.approx(max(scores), abs=1e-6)
    assert strength == STRENGTHS[int(np.argmax(scores))]
    assert (probe.predict(x[30:]) == probe_logits(probe, x[30:]).argmax(1)).all()


def test_two_classes_have_two_logits():
    x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    probe, strength, accuracy = fit_probe(features(x, [0, 0, 1, 1]), None)
    assert (strength, accuracy) == (1.0, None)
    logits = probe_logits(probe, x)
    assert logits.shape == (4, 2)
    expected = probe.predict_proba(x)
    assert np.exp(logits)[:, 1] / np.exp(logits).sum(1) == pytest.approx(expected[:, 1])


def test_cell_is_scikit_learn_on_the_adapters_images(options, colors, tmp_path):
    """Images, features and predictions, computed again without the probe's own code."""
    report = compare(
        tmp_path / "out", shifts=[str(colors.parent / "two")], methods=["probe"], **options
    )
    folder = report.output / "cells" / "colors-shots2-probe-seed2"
    found = read_json(folder / "result.json")
    bundle = load_clip(options["model"])
    dataset = replace(options["data"], shots=2).load()
    split = few_shot_split(dataset.source("train"), dataset.class_names, 2, 2)

    def encoded(samples):
        keys = Counter(sample.key for sample in samples)
        part = replace(dataset, splits={"x": View(dataset.source("train"), times=keys)}, sizes={})
        return image_features(bundle, part, "x", cache=False)

    train, val = encoded(split.train), encoded(split.val)
    assert (len(train.keys), len(val.keys)) == (6, 6)
    probe = LogisticRegression(C=found["options"]["C"], max_iter=5000).fit(
        train.features.double().numpy(), train.labels.numpy()
    )
    assert found["val_acc1"] == pytest.approx(
        probe.score(val.features.double().numpy(), val.labels.numpy()), abs=1e-6
    )
    test = image_features(bundle, dataset, "test", cache=False)
    expected = probe.score(test.features.double().numpy(), test.labels.numpy())
    assert found["results"][0]["metrics"]["acc1"] == pytest.approx(expected, abs=1e-6)
    # The set of two classes is told apart among these two alone.
    two = load_file(folder / "predictions.safetensors")
    assert set(two["two.predicted"]) <= {0, 1}


def test_unknown_classes_are_refused(options, colors, tmp_path):
    other = tmp_path / "other"
    for name in ("red", "violet"):
        (other / name).mkdir(parents=True)
        for path in (colors / "red").iterdir():
            (other / name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(VlkrError, match="has not learned class 'violet' of 'other'"):
        compare(tmp_path / "out", shifts=[str(other)], methods=["probe"], **options)
