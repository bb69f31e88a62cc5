import json

import pytest
import torch
import yaml
from helpers import small_run, tree, write_images
from PIL import Image

import vlkr
from vlkr.cli import main
from vlkr.datasets import DataConfig, load_dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate, evaluate_model
from vlkr.evaluation.interpolation import interpolate
from vlkr.models.clip import load_clip
from vlkr.runs import RunFolder


@pytest.fixture(scope="module")
def shift(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "shift", 9)


@pytest.fixture(scope="module")
def line(run, colors, shift):
    return interpolate(
        run, datasets=[str(colors), str(shift)], alphas=[1.0, 0.0, 0.5, 2.0], cache=False
    )


def metrics(evaluation):
    return [result.metrics for result in evaluation.results]


def test_ends_are_the_base_model_and_the_run(line, run, small, colors, shift):
    assert [point.alpha for point in line.points] == [0, 0.5, 1, 2]
    datasets = [load_dataset(colors), load_dataset(shift)]
    base = evaluate_model(load_clip(small), datasets)
    adapted = evaluate(run=run, datasets=[str(colors), str(shift)])
    assert metrics(line.points[0].evaluation) == metrics(base)
    assert metrics(line.points[2].evaluation) == metrics(adapted)
    middle = metrics(line.points[1].evaluation)
    assert middle not in (metrics(base), metrics(adapted), metrics(line.points[3].evaluation))


def test_half_way_is_the_mean_of_the_weights(line, run, colors):
    bundle = RunFolder.open(run).load_model()
    base = {name: p.detach().clone() for name, p in load_clip(bundle.name).model.named_parameters()}
    vlkr.merge_and_unload(bundle.model)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            parameter.copy_(0.5 * base[name] + 0.5 * parameter)
    mean = evaluate_model(bundle, [load_dataset(colors)]).in_distribution
    assert line.points[1].evaluation.in_distribution.metrics == pytest.approx(
        mean.metrics, abs=1e-4
    )


def test_best_is_chosen_on_the_validation_images_of_the_run(line, run, colors, shift):
    validation = RunFolder.open(run).validation()
    kept = {sample.key for sample in validation.source("val")}
    dataset = load_dataset(colors)
    assert kept <= {sample.key for sample in dataset.source("train")}
    assert not kept & {sample.key for sample in dataset.source("test")}
    assert line.points[0].validation.images == len(kept) > 0
    scores = [
        (-p.validation.metrics["acc1"], p.validation.metrics["nll"], p.alpha) for p in line.points
    ]
    assert line.best.alpha == min(scores)[2]
    # The choice does not depend on the evaluated datasets.
    other = interpolate(run, datasets=[str(shift)], alphas=[0, 0.5, 1, 2], cache=False)
    metrics = [[p.validation.metrics for p in found.points] for found in (other, line)]
    assert metrics[0] == metrics[1]
    assert other.best.alpha == line.best.alpha


def test_without_validation_images_there_is_no_best(small, tmp_path):
    root = write_images(tmp_path / "d", 4, splits=["train", "test"])
    run = small_run(tmp_path / "run", small, root, data=DataConfig(root=root, shots=4)).output
    before = tree(run)
    result = interpolate(run, alphas=[0, 1])
    assert tree(run) == before
    assert result.best is None
    assert result.points[0].validation is None
    assert result.to_json()["best_alpha"] is None
    assert "No best alpha: the run has no validation image" in result.note()
    with pytest.raises(VlkrError, match="--save best needs validation images"):
        interpolate(run, alphas=[0, 1], save="best", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_datasets_own_validation_split_is_used(small, tmp_path):
    root = write_images(tmp_path / "d", 6, splits=["train", "val", "test"])
    run = small_run(tmp_path / "run", small, root).output
    validation = RunFolder.open(run).validation()
    expected = [sample.key for sample in load_dataset(root).source("val")]
    assert [sample.key for sample in validation.source("val")] == expected


def test_command_prints_and_writes(run, colors, shift, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["interpolate", "--run", str(run), "--datasets", str(colors), str(shift)]
    arguments += ["--alphas", "0", "0.5", "1", "--output", str(output)]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("Top-1 accuracy along the adapter", "best alpha", "shots 4", "seed 1", "Written:"):
        assert part in printed
    assert set(tree(output)) == {"interpolation.json", "report.md", "interpolation.png"}
    with Image.open(output / "interpolation.png") as figure:
        assert min(figure.size) > 300
    found = json.loads((output / "interpolation.json").read_text())
    assert [point["alpha"] for point in found["points"]] == [0, 0.5, 1]
    assert found["saved_alpha"] is None
    page = (output / "report.md").read_text()
    assert f"| {found['best_alpha']:g} * |" in page
    assert main([*arguments, "--json"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("save", ["0.25", "best"])
def test_a_saved_alpha_is_a_run(run, tmp_path, save):
    output = tmp_path / "out"
    result = interpolate(run, alphas=[0, 0.25, 1], save=save, output=output)
    expected = result.best.alpha if save == "best" else 0.25
    assert result.saved == expected
    point = next(point for point in result.points if point.alpha == expected)
    again = evaluate(run=output)
    assert metrics(again) == metrics(point.evaluation)
    assert again.context.get("adapter scale") == (None if expected == 1 else expected)
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 1
    # Alphas of a scaled run multiply its scale.
    once_more = interpolate(output, alphas=[1.0])
    assert metrics(once_more.points[0].evaluation) == metrics(point.evaluation)


def test_table_of_several_shifts_and_of_none(run, colors, shift):
    three = interpolate(run, datasets=[str(colors), str(shift), str(colors)], alphas=[1])
    assert [*three.tables()[0].header] == [
        "alpha",
        "validation %",
        "colors (in-distribution) %",
        "mean of 2 shifts %",
        "worst shift %",
    ]
    alone = interpolate(run, alphas=[1])
    assert alone.tables()[0].header == ("alpha", "validation %", "colors (in-distribution) %")
    assert alone.tables()[0].rows[0][0] == "1 *"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": []}, "list of alphas is empty"),
        ({"alphas": [0.5, float("nan")]}, "alpha nan is not a finite number"),
        ({"save": "0.5"}, "--save 0.5 needs a folder"),
        ({"save": "worst", "output": "OUT"}, "'worst' is neither a number nor 'best'"),
        ({"datasets": ["digitz"]}, "did you mean digits"),
        ({"split": "val"}, "has no split 'val'"),
    ],
)
def test_wrong_options(options, message, run, tmp_path):
    if "output" in options:
        options = {**options, "output": tmp_path / "out"}
    with pytest.raises(VlkrError, match=message):
        interpolate(run, **options)
    assert not (tmp_path / "out").exists()
