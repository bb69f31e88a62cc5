"""Before and after, on the dataset adapted to and on others."""

import shutil
import statistics
from dataclasses import replace

import pytest
from grids import transfer
from helpers import small_run, write_images
from PIL import Image

from vlkr.comparison.options import MethodConfig
from vlkr.config import AdapterConfig
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate
from vlkr.files import read_json


@pytest.fixture(scope="module")
def report(options, others, tmp_path_factory):
    output = tmp_path_factory.mktemp("transfer") / "out"
    methods = ["kradapter", "lora"]
    return transfer(output, datasets=others, methods=methods, **options)


def rows(table):
    return {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}


def metrics(output, cell):
    found = read_json(output / "cells" / cell / "result.json")["results"]
    return {result["dataset"]: result["metrics"]["acc1"] for result in found}


def test_zero_shot_is_measured_without_being_asked_for(report):
    assert report.results.methods == ["zero-shot", "kradapter", "lora"]


def test_changes_are_after_less_before(report):
    [table] = [t for t in report.tables() if t.title == "Change against zero-shot"]
    before = metrics(report.output, "colors-zero_shot")
    after = [metrics(report.output, f"colors-lora-lr0.01-epochs1-seed{seed}") for seed in (1, 2)]

    def text(values):
        return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"

    change = {n: [found[n] - before[n] for found in after] for n in before}
    found = rows(table)
    for name in ("colors", "more", "two"):
        assert found[name]["lora"] == text(change[name])
    others = [statistics.mean(pair) for pair in zip(change["more"], change["two"], strict=True)]
    assert found["mean of 2 others"]["lora"] == text(others)
    worst = min(("more", "two"), key=lambda n: statistics.mean(change[n]))
    assert found["least of the others"]["lora"] == f"{text(change[worst])} ({worst})"


def test_a_subset_of_classes_is_told_apart_among_its_own(report):
    found = read_json(report.output / "cells" / "colors-zero_shot" / "result.json")
    [two] = [r for r in found["results"] if r["dataset"] == "two"]
    assert two["metrics"]["acc5"] == 1.0  # two classes
    assert two["images"] < 16


def test_runs_are_measured_as_they_are(options, colors, others, tmp_path):
    first = small_run(tmp_path / "a", options["model"], colors, seed=1).output
    second = small_run(tmp_path / "b", options["model"], colors, seed=2).output
    lora = AdapterConfig("lora", options={"rank": 2})
    third = small_run(tmp_path / "c", options["model"], colors, adapter=lora).output
    report = transfer(
        tmp_path / "out",
        runs=[first, second, third],
        datasets=others,
        trainer=options["trainer"],
    )
    kradapter = next(o for o in report.results.selected if o.entry.method == "kradapter")
    assert kradapter.seeds == [1, 2]
    for folder, outcome, i in ((second, kradapter, 1), (third, report.results.selected[-1], 0)):
        plain = evaluate(run=folder, datasets=[str(colors), *others], device="cpu")
        expected = [result.metrics["acc1"] for result in plain.results]
        assert [outcome.values(n)[i] for n in ("colors", "more", "two")] == expected
        accuracies = report.tables()[0]
        column = accuracies.header.index(outcome.entry.method)
        trained = read_json(folder / "metrics.json")["parameters"]
        assert trained > 0
        assert accuracies.rows[0][column] == f"{trained:,}"
    assert "kradapter" in report.tables()[0].header
    assert "budget" not in report.context


def test_base_to_new_has_its_harmonic_mean(options, tmp_path):
    root = write_images(tmp_path / "colors", per_class=12)
    (root / "yellow").mkdir()
    for i in range(12):
        pixels = Image.new("RGB", (20, 20), (200 + i, 200, 40))
        pixels.save(root / "yellow" / f"{i}.png")
    data = replace(options["data"], root=root, classes="base")
    report = transfer(tmp_path / "out", methods=["lora"], **(options | {"data": data}))
    [table] = report.tables()[:1]
    found = rows(table)
    cells = [metrics(report.output, f"colors-lora-lr0.01-epochs1-seed{seed}") for seed in (1, 2)]
    harmonic = [
        2 * a * b / (a + b) if a + b else 0.0
        for a, b in ((m["colors"], m["colors (new classes)"]) for m in cells)
    ]
    shown = found["harmonic mean of base and new"]["lora"].split(" ± ")[0]
    assert float(shown) == pytest.approx(100 * statistics.mean(harmonic), abs=0.06)
    assert report.context["classes"] == "base"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datasets": None}, "names no shifts; --datasets names what to measure on"),
        ({"datasets": ["nowhere"]}, "no dataset 'nowhere'"),
        ({"methods": [MethodConfig("nothing")]}, "unknown method 'nothing'"),
    ],
)
def test_refuses(options, others, tmp_path, changes, message):
    with pytest.raises(VlkrError, match=message):
        transfer(tmp_path / "out", **(options | {"datasets": others} | changes))
    assert not (tmp_path / "out").exists()


def test_refuses_new_classes_to_adapt_to_and_a_name_twice(options, colors, tmp_path):
    data = replace(options["data"], classes="new")
    with pytest.raises(VlkrError, match="'new' cannot be adapted to"):
        transfer(tmp_path / "out", **(options | {"data": data}))
    with pytest.raises(VlkrError, match="two datasets are named 'colors'"):
        transfer(tmp_path / "out", datasets=[str(colors)], **options)


def test_refuses_runs_that_do_not_belong_together(options, colors, others, tmp_path):
    first = small_run(tmp_path / "a", options["model"], colors).output
    second = small_run(tmp_path / "b", options["model"], colors.parent / "more").output
    with pytest.raises(VlkrError, match="of 2 models, datasets or halves"):
        transfer(tmp_path / "out", runs=[first, second], datasets=others)
    with pytest.raises(VlkrError, match="no run folder at"):
        transfer(tmp_path / "out", runs=[tmp_path / "c"], datasets=others)


def test_runs_that_differ_in_more_than_their_seed_are_told_apart(options, colors, others, tmp_path):
    data = options["data"]
    for shots in (1, 2):
        small_run(tmp_path / f"{shots}", options["model"], colors, data=replace(data, shots=shots))
    runs = [tmp_path / "1", tmp_path / "2"]
    report = transfer(tmp_path / "out", runs=runs, datasets=others)
    assert [o.entry.method for o in report.results.selected] == [
        "zero-shot",
        "kradapter shots=1",
        "kradapter shots=2",
    ]
    assert "shots" not in report.context
    shutil.copytree(tmp_path / "1", tmp_path / "copy")
    with pytest.raises(VlkrError, match="2 runs of kradapter have seed 1"):
        transfer(tmp_path / "more", runs=[tmp_path / "1", tmp_path / "copy"], datasets=others)


def test_a_run_that_was_trained_anew_is_no_finished_cell(options, colors, others, tmp_path):
    run = small_run(tmp_path / "run", options["model"], colors).output
    transfer(tmp_path / "out", runs=[run], datasets=others)
    transfer(tmp_path / "out", runs=[run], datasets=others)
    data = replace(options["data"], shots=1)
    small_run(run, options["model"], colors, data=data, force=True)
    with pytest.raises(VlkrError, match="holds a result of another configuration"):
        transfer(tmp_path / "out", runs=[run], datasets=others)


def test_an_image_encoder_without_text_has_no_zero_shot(options, colors, others, tmp_path):
    plan = transfer(
        tmp_path / "out",
        methods=["lora"],
        datasets=others,
        dry_run=True,
        model="timm:test_vit",
        data=options["data"],
    ).plan
    assert [entry.method for entry in plan.entries] == ["lora"]
