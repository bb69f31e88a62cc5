import json

import pytest
from rich.console import Console

from vlkr.evaluation.metrics import Confused, DatasetResult, DomainAccuracy, ReliabilityBin
from vlkr.evaluation.report import Evaluation
from vlkr.reporting.table import show


def result(name, acc1, **others):
    metrics = {"acc1": acc1, "acc5": 0.9, "mean_per_class_recall": 0.5}
    metrics |= {"f1": 0.4, "ece": 0.1, "nll": 1.25}
    return DatasetResult(name, "test", 10, "card (3)", metrics | others)


EVALUATION = Evaluation(
    [result("home", 0.8), result("a", 0.5), result("b", 0.25, ece=0.4), result("c", 0.6)],
    {"model": "tiny", "pretrained": None, "weights_sha256": "0123456789abcdef" * 4, "shots": 16},
)
ONE_SHIFT = Evaluation(EVALUATION.results[:2], EVALUATION.context)
HOME = Evaluation(EVALUATION.results[:1], EVALUATION.context)


def rows(evaluation):
    table = evaluation.tables()[0]
    return [[*row] for row in (table.header, *table.rows)]


def test_rows():
    header = ["dataset", "images", "top-1 %", "top-5 %", "mean per class %", "F1 %", "ECE %", "NLL"]
    assert rows(EVALUATION) == [
        header,
        ["home", "10", "80.0", "90.0", "50.0", "40.0", "10.0", "1.250"],
        ["a", "10", "50.0", "90.0", "50.0", "40.0", "10.0", "1.250"],
        ["b", "10", "25.0", "90.0", "50.0", "40.0", "40.0", "1.250"],
        ["c", "10", "60.0", "90.0", "50.0", "40.0", "10.0", "1.250"],
        ["mean of 3 shifts", "", "45.0", "90.0", "50.0", "40.0", "20.0", "1.250"],
        ["worst: b", "10", "25.0", "90.0", "50.0", "40.0", "40.0", "1.250"],
    ]


def test_a_metric_that_a_result_lacks_has_no_column():
    lacking = DatasetResult("old", "test", 10, "card (3)", {"acc1": 0.5, "ece": 0.2})
    shown = rows(Evaluation([EVALUATION.in_distribution, lacking]))
    assert shown[0] == ["dataset", "images", "top-1 %", "ECE %"]
    assert shown[2] == ["old", "10", "50.0", "20.0"]


def test_caption_omits_what_is_unknown():
    assert EVALUATION.caption() == (
        "model tiny, weights_sha256 0123456789ab, shots 16, split test, templates card (3)"
    )
    assert EVALUATION.caption({"seed": 3}) == "seed 3, split test, templates card (3)"


def detailed():
    metrics = {"acc1": 0.5, "auroc": 0.75, "mean_domain_acc1": 0.45, "worst_domain_acc1": 0.3}
    return DatasetResult(
        "pets",
        "test",
        10,
        "default (1)",
        metrics | {"effective_robustness": -0.0123},
        {"art": DomainAccuracy(6, 0.6), "photo": DomainAccuracy(4, 0.3)},
        [ReliabilityBin(0.4, 0.466667, 10, 0.45, 0.5)],
        [Confused("cat", "dog", 3, 0.6)],
        ("cat", "dog"),
        [[2, 3], [2, 3]],
    )


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
        "metrics": EVALUATION.results[2].metrics,
        "language": "en",
    }
    assert value["mean_of_shifts"]["acc1"] == 0.45
    assert value["worst_shift"]["dataset"] == "b"
    assert "worst_shift" not in HOME.to_json()


@pytest.mark.parametrize(
    ("evaluation", "title", "names"),
    [
        (HOME, "Accuracy on home", ["home"]),
        (ONE_SHIFT, "Accuracy on home and under 1 shift", ["home", "a"]),
        (
            EVALUATION,
            "Accuracy on home and under 3 shifts",
            ["home", "a", "b", "c", "mean of 3 shifts", "worst: b"],
        ),
    ],
)
def test_title_and_summary_rows(evaluation, title, names):
    assert evaluation.title == title
    assert [row[0] for row in rows(evaluation)] == ["dataset", *names]
    page = evaluation.markdown()
    assert page.startswith(f"# {title}\n")
    assert evaluation.caption() in page
    assert "confused" not in page


def test_domains_further_metrics_and_confusions(capsys):
    metrics = {"acc1": 0.5, "auroc": 0.75, "mean_domain_acc1": 0.45, "worst_domain_acc1": 0.3}
    detailed = DatasetResult(
        "pets",
        "test",
        10,
        "default (1)",
        metrics | {"effective_robustness": -0.0123},
        {"art": DomainAccuracy(6, 0.6), "photo": DomainAccuracy(4, 0.3)},
        [ReliabilityBin(0.4, 0.466667, 10, 0.45, 0.5)],
        [Confused("cat", "dog", 3, 0.6)],
        ("cat", "dog"),
        [[2, 3], [2, 3]],
    )
    evaluation = Evaluation([detailed])
    page = evaluation.markdown()
    show(evaluation, Console(width=80))
    printed = capsys.readouterr().out.splitlines()
    for label, value in (
        ("AUROC known against unknown %", "75.0"),
        ("mean of domains, top-1 %", "45.0"),
        ("worst domain, top-1 %", "30.0"),
        ("effective robustness, points", "-1.2"),
        ("art (6 images), top-1 %", "60.0"),
        ("photo (4 images), top-1 %", "30.0"),
    ):
        assert f"| {label} | {value} |" in page
        assert [line for line in printed if label in line and value in line]
    assert "| pets | cat | dog | 3 | 60.0 |" in page
    found = json.loads(json.dumps(evaluation.to_json()))["results"][0]
    assert found["domains"]["art"] == {"images": 6, "acc1": 0.6}
    assert found["reliability"][0]["accuracy"] == 0.5
    assert found["worst_confusions"] == [
        {"label": "cat", "predicted": "dog", "images": 3, "fraction": 0.6}
    ]
    assert "confusion" not in found


@pytest.mark.parametrize("width", [80, 100])
def test_numbers_are_never_cut_off(width, capsys):
    names = ["digits", "digits-inverted", "digits-rotation"]
    evaluation = Evaluation([result(name, 1.0, acc5=1.0, nll=12.345) for name in names])
    show(evaluation, Console(width=width))
    printed = capsys.readouterr().out
    assert width < 100 or "…" not in printed  # a header may be cut where there is no room
    assert printed.count("100.0") == 2 * 5
    assert printed.count("12.345") == 5
    assert max(map(len, printed.splitlines())) <= width
