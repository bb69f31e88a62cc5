import json

from vlkr.evaluation.report import (
    DatasetResult,
    Evaluation,
    caption,
    evaluation_markdown,
    evaluation_rows,
    markdown_table,
)


def result(name, acc1, **others):
    metrics = {"acc1": acc1, "acc5": 0.9, "mean_per_class_recall": 0.5, "ece": 0.1} | others
    return DatasetResult(name, "test", 10, "card (3)", metrics)


EVALUATION = Evaluation(
    [result("home", 0.8), result("a", 0.5), result("b", 0.25, ece=0.4), result("c", 0.6)],
    {"model": "tiny", "pretrained": None, "weights_sha256": "0123456789abcdef" * 4, "shots": 16},
)


def test_mean_and_worst_shift():
    assert EVALUATION.home.dataset == "home"
    assert EVALUATION.mean_shift() == (0.5 + 0.25 + 0.6) / 3
    assert abs(EVALUATION.mean_shift("ece") - (0.1 + 0.4 + 0.1) / 3) < 1e-12
    assert EVALUATION.worst_shift().dataset == "b"


def test_rows():
    assert evaluation_rows(EVALUATION) == [
        ["dataset", "images", "top-1 %", "top-5 %", "mean per class %", "ECE %"],
        ["home", "10", "80.0", "90.0", "50.0", "10.0"],
        ["a", "10", "50.0", "90.0", "50.0", "10.0"],
        ["b", "10", "25.0", "90.0", "50.0", "40.0"],
        ["c", "10", "60.0", "90.0", "50.0", "10.0"],
        ["mean of 3 shifts", "", "45.0", "90.0", "50.0", "20.0"],
        ["worst shift (b)", "10", "25.0", "90.0", "50.0", "40.0"],
    ]
    one = Evaluation(EVALUATION.results[:2])
    assert [row[0] for row in evaluation_rows(one)[3:]] == ["mean of 1 shift", "worst shift (a)"]
    assert len(evaluation_rows(Evaluation(EVALUATION.results[:1]))) == 2


def test_caption_leaves_out_what_is_not_known():
    assert caption(EVALUATION) == (
        "model tiny, weights_sha256 0123456789ab, shots 16, split test, templates card (3)"
    )


def test_markdown():
    assert markdown_table([["a|b", "c"], ["1", "2"]]) == "| a\\|b | c |\n|---|---:|\n| 1 | 2 |\n"
    page = evaluation_markdown(EVALUATION)
    assert "| worst shift (b) | 10 | 25.0 |" in page
    assert caption(EVALUATION) in page


def test_json_has_clip_benchmarks_fields():
    value = json.loads(json.dumps(EVALUATION.to_json()))
    assert value["shots"] == 16
    assert [r["dataset"] for r in value["results"]] == ["home", "a", "b", "c"]
    assert value["results"][2] == {
        "dataset": "b",
        "model": "tiny",
        "pretrained": None,
        "task": "zeroshot_classification",
        "split": "test",
        "images": 10,
        "templates": "card (3)",
        "metrics": {"acc1": 0.25, "acc5": 0.9, "mean_per_class_recall": 0.5, "ece": 0.4},
        "language": "en",
    }
