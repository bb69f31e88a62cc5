import json

import pytest
import yaml
from helpers import ROOT, tree, write_images
from PIL import Image

from vlkr.cli import main
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate
from vlkr.evaluation.metrics import effective_robustness
from vlkr.evaluation.predictions import Predictions
from vlkr.runs import RunFolder


def test_shifts_of_the_first_card_are_added_once(small):
    card = yaml.safe_load((ROOT / "data" / "digits.yaml").read_text())
    result = evaluate(model=small)
    assert [r.dataset for r in result.results] == ["digits", *card["shifts"]]
    accuracy = {r.dataset: r.metrics["acc1"] for r in result.shifts}
    assert result.mean_shift() == pytest.approx(sum(accuracy.values()) / len(accuracy))
    assert result.worst_shift().metrics["acc1"] == min(accuracy.values())
    given = evaluate(model=small, datasets=["digits", "digits-fonts"])
    assert [r.dataset for r in given.results] == [
        "digits",
        "digits-fonts",
        *(name for name in card["shifts"] if name != "digits-fonts"),
    ]
    assert len(evaluate(model=small, include_shifts=False).results) == 1


def test_templates_can_be_replaced(small, colors, tmp_path):
    (tmp_path / "mine.txt").write_text("a sketch of a {}.\nart of a {c}\n")

    def result(templates):
        return evaluate(model=small, datasets=[str(colors)], templates=templates).in_distribution

    default, named, mine = result(None), result(["imagenet7"]), result([str(tmp_path / "mine.txt")])
    given = result(["a sketch of a {c}.", "art of a {c}"])
    assert [r.templates for r in (default, named, mine, given)] == [
        "default (1)",
        "imagenet7 (7)",
        "mine.txt (2)",
        "given (2)",
    ]
    assert result(["a photo of a {c}."]).metrics == default.metrics
    assert given.metrics == mine.metrics != named.metrics


def test_a_run_is_evaluated_on_its_own_data(run, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    found = evaluate(run=run)
    assert found.to_json()["results"] == metrics["results"]
    assert found.context["weights_sha256"] == metrics["weights_sha256"]
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found.to_json()
    assert main(["evaluate", "--run", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("colors", "adapter kradapter", "shots 4", "seed 1", "split test", "default (1)"):
        assert part in printed


def test_effective_robustness_against_a_zero_shot_model_and_chance(run, small, colors, tmp_path):
    shift = str(write_images(tmp_path / "shift", 9))
    datasets = [str(colors), shift]
    zero_shot = evaluate(model=small, datasets=datasets, output=tmp_path / "zero-shot")
    found = evaluate(run=run, datasets=datasets, reference=[tmp_path / "zero-shot"])
    points = [(1 / 3, 1 / 3), tuple(r.metrics["acc1"] for r in zero_shot.results)]
    home, shifted = (r.metrics["acc1"] for r in found.results)
    expected = effective_robustness(home, shifted, points)
    assert found.shifts[0].metrics["effective_robustness"] == expected
    assert "effective_robustness" not in found.in_distribution.metrics
    assert found.context["effective robustness against"].endswith(") and chance")
    page = found.markdown()
    assert f"| effective robustness, points | {100 * expected:.1f} |" in page


@pytest.fixture(scope="module")
def references(tmp_path_factory, run, small, colors):
    """Evaluations on disk: zero-shot without a shift, and of an adapted model."""
    folder = tmp_path_factory.mktemp("references")
    evaluate(model=small, datasets=[str(colors)], output=folder / "zero-shot")
    evaluate(run=run, output=folder / "adapted")
    (folder / "list").mkdir()
    (folder / "list" / "metrics.json").write_text('{"model": "m", "weights_sha256": "0"}')
    write_images(folder / "shift", 2)
    return folder


@pytest.mark.parametrize(
    ("reference", "names", "message"),
    [
        ("zero-shot", ["shift"], "no result on dataset 'shift', split 'test'"),
        ("zero-shot", [], "needs a shift"),
        ("adapted", ["shift"], "is from an adapted model"),
        ("list", ["shift"], r"metrics\.json is not an evaluation of a model"),
        ("shift", ["shift"], "cannot read .*metrics.json"),
    ],
)
def test_references_that_do_not_fit(references, small, colors, reference, names, message):
    datasets = [str(colors), *(str(references / name) for name in names)]
    with pytest.raises(VlkrError, match=message):
        evaluate(model=small, datasets=datasets, reference=[references / reference])


def test_output_is_written_and_not_replaced_unasked(small, colors, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["evaluate", "--model", small, "--datasets", str(colors), "--output", str(output)]
    arguments.append("--keep-predictions")
    assert main(arguments) == 0
    files = {"metrics.json", "report.md", "confusion.json", "reliability.png", "predictions"}
    assert set(tree(output)) == files | {"predictions/colors.jsonl"}
    written = Predictions.read_jsonl(output / "predictions" / "colors.jsonl")
    with Image.open(output / "reliability.png") as figure:
        assert figure.size[0] > 300
    counts = json.loads((output / "confusion.json").read_text())["colors"]
    found = json.loads((output / "metrics.json").read_text())["results"][0]
    assert counts["class_names"] == ["blue", "green", "red"]
    assert sum(map(sum, counts["counts"])) == found["images"] == len(written)
    before = tree(output)
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert tree(output) == before
    assert main([*arguments, "--force"]) == 0
    assert tree(output) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_reported_in_one_line(small, tmp_path, capsys, workers):
    root = write_images(tmp_path / "d", per_class=2, splits=["test"])
    (root / "test" / "red" / "1.png").write_bytes(b"garbage")
    arguments = ["evaluate", "--model", small, "--datasets", str(root)]
    assert main([*arguments, "--num-workers", str(workers)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    reason, _, hint = error.partition("; ")
    assert reason == "vlkr: error: sample 'red/1.png' is not an image in a known format"
    assert hint == "max_bad lets such samples be skipped"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --model NAME or --run DIR"),
        ({"model": "SMALL", "run": "RUN"}, "either --model NAME or --run DIR, not both"),
        ({"run": "RUN", "pretrained": "openai"}, "--pretrained goes with --model"),
        ({"model": "SMALL", "batch_size": 0}, "batch size 0 is too small"),
        ({"model": "SMALL", "num_workers": -1}, "number of workers -1 is negative"),
        ({"model": "SMALL", "device": "gpu"}, "device 'gpu' is not available"),
        ({"model": "SMALL", "split": "val"}, "has no split 'val'"),
        ({"model": "SMALL", "datasets": ["digitz"]}, "did you mean digits"),
        ({"model": "SMALL", "templates": []}, "list of templates is empty"),
        ({"model": "SMALL", "templates": ["x"]}, "lacks the placeholder"),
        ({"model": "SMALL", "templates": ["imagenet81"]}, "did you mean imagenet80"),
        ({"model": "SMALL", "devices": 0}, "number of devices 0 is too small"),
        ({"model": "SMALL", "unknown": ["digitz"]}, "did you mean digits"),
        ({"model": "SMALL", "reference": [ROOT / "nowhere.json"]}, "cannot read .*nowhere"),
        ({"model": "SMALL", "output": ROOT / "pyproject.toml"}, "is a file"),
    ],
)
def test_wrong_options(options, message, small, run):
    names = {"SMALL": small, "RUN": run}
    options = {k: names.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(VlkrError, match=message):
        evaluate(**options)


def test_the_test_fraction_defaults_to_that_of_the_run(run, colors):
    def images(**options):
        return evaluate(
            run=run, datasets=[str(colors)], device="cpu", **options
        ).in_distribution.images

    fraction = RunFolder.open(run).config.data.test_fraction
    assert images() == images(test_fraction=fraction)
    assert images(test_fraction=0.9) > images() > images(test_fraction=0.1)
