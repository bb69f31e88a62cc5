"""What ``vlkr compare`` reports, computed again from the cells' folders."""

import csv
import json
import statistics
from dataclasses import replace

import pytest
from grids import compare
from helpers import write_images
from safetensors.numpy import load_file

from vlkr.comparison import figures
from vlkr.comparison.methods import base_context
from vlkr.comparison.options import GridConfig, MethodConfig
from vlkr.comparison.results import read_results
from vlkr.config import AdapterConfig
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate
from vlkr.files import read_json, write_json
from vlkr.training.recipe import adapt

METHODS = [
    "zero-shot",
    "probe",
    MethodConfig("kradapter", lrs=[1e-3, 3e-2]),
    "lora",
    "full",
]


@pytest.fixture(scope="module")
def report(options, others, tmp_path_factory):
    output = tmp_path_factory.mktemp("compare") / "out"
    return compare(output, shifts=others, shots=[4, 1], methods=METHODS, spectra=True, **options)


def cell(report, *words):
    """The one folder whose name has all the words."""
    [found] = [
        path
        for path in (report.output / "cells").iterdir()
        if all(f"-{word}-" in f"-{path.name}-" for word in words)
    ]
    return found


def acc1(report, name, *words):
    """Top-1 accuracy of a cell on a set, from its predictions."""
    found = load_file(cell(report, *words) / "predictions.safetensors")
    return float((found[f"{name}.labels"] == found[f"{name}.predicted"]).mean())


def column(table, method):
    index = table.header.index(method)
    return {row[0]: row[index] for row in table.rows}


def test_a_cell_is_vlkr_adapt_and_vlkr_evaluate(report, options, others, tmp_path):
    """An adapter trained and measured by the plain commands reaches the same to the last digit."""
    data = replace(options["data"], shots=4)
    result = adapt(
        tmp_path / "run",
        options["model"],
        adapter=AdapterConfig("lora", match="kradapter"),
        data=data,
        optimizer=options["optimizer"],
        trainer=options["trainer"],
        seed=2,
    )
    plain = evaluate(run=result.output, datasets=[str(data.root), *others], device="cpu")
    found = read_json(cell(report, "shots4", "lora", "seed2") / "result.json")
    assert [r["metrics"] for r in found["results"]] == [r.metrics for r in plain.results]
    assert found["parameters"] == result.parameters
    ours = load_file(
        cell(report, "shots4", "lora", "seed2") / "run/adapter/adapter_model.safetensors"
    )
    theirs = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all((ours[key] == theirs[key]).all() for key in theirs)


def test_zero_shot_is_vlkr_evaluate(report, options, others):
    plain = evaluate(
        model=options["model"], datasets=[str(options["data"].root), *others], device="cpu"
    )
    found = read_json(cell(report, "zero_shot") / "result.json")
    assert [r["metrics"] for r in found["results"]] == [r.metrics for r in plain.results]


def test_table_has_mean_and_deviation_over_seeds(report):
    most, least = report.tables()[:2]
    assert (most.title, least.title) == ("Top-1 accuracy, 4 shots", "Top-1 accuracy, 1 shot")
    for table, shots in ((most, "shots4"), (least, "shots1")):
        for method in ("lora", "full", "probe"):
            each = [
                [acc1(report, name, shots, method, f"seed{seed}") for seed in (1, 2)]
                for name in ("colors", "more", "two")
            ]
            rows = column(table, method)

            def text(values):
                return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"

            assert [rows[n] for n in ("colors (in-distribution)", "more", "two")] == [
                text(v) for v in each
            ]
            both = list(zip(*each[1:], strict=True))
            assert rows["mean of shifts"] == text([statistics.mean(v) for v in both])
            assert rows["worst shift"] == text([min(v) for v in both])


def test_budgets_are_equal_but_for_the_ends_of_the_scale(report):
    numbers = {
        method: int(column(report.tables()[0], method)["trained parameters"].replace(",", ""))
        for method in report.results.methods
    }
    assert numbers["lora"] == pytest.approx(numbers["kradapter"], rel=0.2)
    assert numbers["zero-shot"] == 0 < numbers["probe"] < numbers["kradapter"] < numbers["full"]
    assert numbers["probe"] == 3 * (32 + 1)


def test_budget_counts_the_options_of_the_method_to_meet(options, tmp_path):
    methods = [MethodConfig("kradapter", options={"num_terms": 3}), "lora"]
    report = compare(tmp_path / "out", methods=methods, **options)
    kradapter, lora = (o.results[0].record for o in report.results.selected)
    assert lora["parameters"] == pytest.approx(kradapter["parameters"], rel=0.1)
    own = compare(
        tmp_path / "own",
        methods=[MethodConfig("lora", options={"rank": 1})],
        budget="own",
        **options,
    )
    assert own.results.selected[0].results[0].record["options"]["rank"] == 1


@pytest.mark.parametrize("favored", ["0.001", "0.03"])
def test_learning_rate_is_never_chosen_on_test(report, tmp_path, favored):
    """A rate that is perfect on test and bad on validation is not taken."""
    for path in report.output.glob("cells/*/result.json"):
        record = read_json(path)
        if "-shots4-kradapter-" in path.parent.name:
            good = f"-lr{favored}-" in path.parent.name
            record["val_acc1"] = 0.9 if good else 0.1
            for result in record["results"]:
                result["metrics"]["acc1"] = 0.0 if good else 1.0
        write_json(tmp_path / path.relative_to(report.output), record)
    again = read_results(report.results.plan, tmp_path)
    outcome = again.at("kradapter", {"dataset": "colors", "shots": 4})
    assert outcome.chosen.setting["lr"] == float(favored)
    assert outcome.values("colors") == [0.0, 0.0]


def test_csv_has_every_cell_and_set(report):
    rows = list(csv.DictReader((report.output / "results.csv").read_text().splitlines()))
    finished = list(report.output.glob("cells/*/result.json"))
    assert len(rows) == 3 * len(finished)
    for row in rows:
        found = read_json(report.output / "cells" / row["cell"] / "result.json")
        metrics = {r["dataset"]: r["metrics"] for r in found["results"]}[row["set"]]
        assert float(row["acc1"]) == metrics["acc1"]
        assert float(row["ece"]) == metrics["ece"]
    chosen = [row for row in rows if row["chosen"] == "True"]
    assert len(chosen) == len(rows) - 3 * 2 * 2  # of two rates one: 2 shots, 2 seeds


def test_clip_benchmarks_files_are_what_its_builder_reads(report):
    files = list((report.output / "clip_benchmark").iterdir())
    assert len(files) == 3 * (1 + 4 * 2 * 2)
    for path in files:
        found = json.loads(path.read_text())
        assert set(found) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
        assert found["task"] == "zeroshot_classification"
        assert {"acc1", "acc5", "mean_per_class_recall"} <= set(found["metrics"])
        assert isinstance(found["model"] + " " + found["pretrained"], str)


def test_json_is_complete(report):
    found = json.loads((report.output / "results.json").read_text())
    assert found == json.loads(json.dumps(report.to_json()))
    lora = next(e for e in found["entries"] if e["method"] == "lora" and e["shots"] == 4)
    assert lora["seeds"] == [1, 2]
    assert lora["sets"]["more"]["acc1"] == [
        round(acc1(report, "more", "shots4", "lora", f"seed{seed}"), 6) for seed in (1, 2)
    ]


def test_every_number_has_its_context(report):
    text = (report.output / "report.md").read_text()
    for part in (
        "model local-dir:",
        "weights ",
        "templates default (1)",
        "split test",
        "shots 1 4",
        "seeds 1 2",
        "checkpoint last iteration",
        "learning rate by mean validation accuracy per method",
        "epochs 1",
        "budget match kradapter",
    ):
        assert part in text
    assert "![Accuracy over shots](plots/shots.png)" in text


def test_cost_is_that_of_the_cells(report):
    [table] = [t for t in report.tables() if t.title == "Cost"]
    found = [
        read_json(path / "result.json")
        for path in (report.output / "cells").iterdir()
        if "-lora-" in path.name
    ]
    row = next(row for row in table.rows if row[0] == "lora")
    assert table.header[2:4] == ("training images", "cells")
    assert row[2:4] == ("3 to 12", "4 of 4")  # 1 and 4 shots of three classes
    assert float(row[4]) == pytest.approx(
        statistics.mean(f["train_seconds"] for f in found), abs=0.06
    )
    assert float(row[6].replace(",", "")) == pytest.approx(
        max(f["peak_memory_mib"] for f in found), abs=0.6
    )


def test_several_datasets_have_their_mean(options, colors, tmp_path):
    other = write_images(tmp_path / "other", per_class=8)
    report = compare(
        tmp_path / "out", datasets=[str(colors), str(other)], methods=["probe", "lora"], **options
    )
    rows = column(report.tables()[0], "probe")
    each = [
        [acc1(report, name, name, "probe", f"seed{seed}") for seed in (1, 2)]
        for name in ("colors", "other")
    ]
    means = [statistics.mean(pair) for pair in zip(*each, strict=True)]
    assert rows["mean of 2 datasets"] == (
        f"{100 * statistics.mean(means):.1f} ± {100 * statistics.stdev(means):.1f}"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ["krdapter"]},
            "unknown method 'krdapter'; known: zero-shot, probe, kradapter",
        ),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["lora", "lora"]}, "two methods are labeled 'lora'"),
        ({"methods": [MethodConfig("lora", options={"rank": 2})]}, "has its own rank"),
        ({"methods": [MethodConfig("lora", options={"size": 2})]}, "no option 'size'"),
        ({"budget": "equal"}, "budget 'equal' is neither 'own' nor 'match METHOD'"),
        ({"budget": "match nothing"}, "unknown adapter 'nothing'"),
        ({"seeds": [1, 1]}, "repeats itself"),
        ({"methods": [MethodConfig("lora", lrs=[1, 1])]}, r"lrs of lora \[1, 1\] is empty or"),
        ({"methods": [MethodConfig("lora", epochs=[])]}, r"epochs of lora \[\] is empty or"),
        ({"reference": "loar"}, "reference 'loar' is none of the methods, which are zero-shot"),
        ({"seeds": [-1]}, "seed -1 is out of range"),
        ({"methods": ["lora"], "lrs": [0.0]}, "optimizer.lr is 0.0: "),
        ({"methods": ["lora"], "epochs": [0]}, "trainer.epochs is 0: "),
        ({"shots": [0]}, "a number below 1"),
        ({"jobs": -1}, "jobs -1 is negative"),
        ({"jobs": 0, "force": True}, "jobs 0 computes nothing"),
        ({"steps_per_shot": 0}, "steps_per_shot 0 is too small"),
        ({"launcher": "sbatch"}, "lacks {command}"),
        ({"data": DataConfig("digits", fraction=0.5)}, "data.fraction 0.5 does not go with"),
        ({"data": DataConfig("digits", split_file="x")}, "data.split_file x does not go with"),
        ({"data": DataConfig()}, "no dataset"),
        ({"data": DataConfig("nowhere")}, "no dataset 'nowhere'"),
        ({"shifts": ["nowhere"]}, "no dataset 'nowhere'"),
        ({"model": "timm:vit_tiny_patch16_224"}, "has no text for zero-shot"),
    ],
)
def test_wrong_options_write_nothing(options, tmp_path, changes, message):
    with pytest.raises(VlkrError, match=message):
        compare(tmp_path / "out", **(options | {"methods": ["zero-shot"]} | changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("points", [[(80, 60), (90, 65)], [(30, 20)]])
def test_home_against_shift_shows_the_points_and_little_else(report, points, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.figures, "save_figure", lambda figure, path: drawn.append(figure))
    places = [{"dataset": "colors", "shots": i} for i in range(len(points))]
    figures.plot_shift(
        report.results,
        places,
        lambda method, place: [points[place["shots"]][0] / 100],
        lambda method, place: [points[place["shots"]][1] / 100],
        ("home", "shift"),
        report.output,
    )
    (axes,) = drawn[0].axes
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left < x < right and low < y < high for x, y in points)
    assert right - left < 15
    assert high - low < 10


@pytest.mark.parametrize(
    ("methods", "rate"),
    [
        (["kradapter", "lora"], "0.01"),
        ([MethodConfig("kradapter", lrs=[0.002]), "lora"], "0.002 of kradapter, 0.01 of lora"),
        ([MethodConfig("kradapter", lrs=[0.002, 0.1]), "lora"], "by mean validation accuracy"),
    ],
)
def test_the_learning_rate_is_told(methods, rate, options):
    context = base_context(GridConfig(**options, methods=methods), "by mean validation accuracy")
    assert context["learning rate"] == rate
    assert context["epochs"] == "1"


def test_zero_shot_has_no_learning_rate(options):
    context = base_context(GridConfig(**options, methods=["zero-shot", "probe"]), "unused")
    assert "learning rate" not in context
