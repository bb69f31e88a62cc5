import json
import math

import pytest
import torch

from vlkr.errors import VlkrError
from vlkr.evaluation.predictions import Predictions, predict


@pytest.fixture
def predictions():
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    return predict(logits, torch.tensor([2, 1]), ["b", "a"], ["art", None])


def test_softmax_by_hand(predictions):
    assert predictions.keys == ["b", "a"]
    assert predictions.labels == [2, 1]
    assert predictions.predicted[0] == 1
    total = math.exp(0) + math.exp(2) + math.exp(1)
    assert predictions.confidence == pytest.approx(
        [math.exp(2) / total, math.e / (2 * math.e + 1)], abs=1e-12
    )
    assert predictions.nll == pytest.approx(
        [-math.log(math.e / total), -math.log(math.e / (2 * math.e + 1))], abs=1e-12
    )
    assert predictions.in_top5 == [True, True]
    assert predictions.domains == ["art", None]


def test_five_largest_logits_and_confidence_of_at_most_one():
    many = predict(torch.arange(8.0).repeat(8, 1), torch.arange(8), list("abcdefgh"), [None] * 8)
    assert many.in_top5 == [False] * 3 + [True] * 5
    certain = predict(1e4 * torch.eye(4), torch.arange(4), list("abcd"), [None] * 4)
    assert certain.confidence == [1.0] * 4
    assert [str(value) for value in certain.nll] == ["0.0"] * 4


def test_joined_is_sorted_by_key(predictions):
    other = predict(torch.zeros(1, 3), torch.tensor([0]), ["aa"], ["photo"])
    joined = Predictions.joined([predictions, other])
    assert joined.keys == ["a", "aa", "b"]
    assert joined.labels == [1, 0, 2]
    assert joined.domains == [None, "photo", "art"]
    assert joined == Predictions.joined([other, predictions])
    assert len(joined) == 3
    assert len(Predictions.joined([])) == 0


def test_json_lines(predictions, tmp_path):
    predictions.write_jsonl(tmp_path / "predictions.jsonl")
    first = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert first == {
        "key": "b",
        "label": 2,
        "predicted": 1,
        "confidence": predictions.confidence[0],
        "in_top5": True,
        "nll": predictions.nll[0],
        "domain": "art",
    }
    assert Predictions.read_jsonl(tmp_path / "predictions.jsonl") == predictions


@pytest.mark.parametrize("text", ["{", "[]\n", '{"key": "a"}\n', "3\n"])
def test_other_files(text, tmp_path):
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(VlkrError, match="cannot read"):
        Predictions.read_jsonl(path)
    path.write_text(text)
    with pytest.raises(VlkrError, match=r"predictions\.jsonl does not hold predictions"):
        Predictions.read_jsonl(path)
