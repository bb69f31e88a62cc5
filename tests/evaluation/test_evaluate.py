import json

import pytest
import yaml
from helpers import ROOT, tree, write_images, write_shards
from PIL import Image

from vlkr.cli import main
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate
from vlkr.evaluation.metrics import effective_robustness
from vlkr.evaluation.predictions import Predictions
from vlkr.runs import RunFolder


def test_shifts_follow_the_home_card_and_are_not_doubled(small):
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
    assert len(evaluate(model=small, shifts=False).results) == 1


def test_templates_can_be_replaced(small, colors):
    own = evaluate(model=small, datasets=[str(colors)]).in_distribution
    same = evaluate(
        model=small, datasets=[str(colors)], templates=["a photo of a {c}."]
    ).in_distribution
    other = evaluate(model=small, datasets=[str(colors)], templates=["{c}", "{c}!"]).in_distribution
    assert same.metrics == own.metrics
    assert (own.templates, other.templates) == ("default (1)", "given (2)")


def test_run_is_measured_on_its_own_data(run):
    metrics = json.loads((run / "metrics.json").read_text())
    found = evaluate(run=run)
    assert found.to_json()["results"] == metrics["results"]
    assert found.context["shots"] == 4
    assert found.context["adapter"] == "kradapter"
    assert found.context["weights_sha256"] == metrics["weights_sha256"]


def test_named_templates_and_a_file(small, colors, tmp_path):
    (tmp_path / "mine.txt").write_text("a sketch of a {}.\nart of a {c}\n")
    named = evaluate(model=small, datasets=[str(colors)], templates=["imagenet7"]).in_distribution
    mine = evaluate(model=small, datasets=[str(colors)], templates=[str(tmp_path / "mine.txt")])
    same = ["a sketch of a {c}.", "art of a {c}"]
    assert named.templates == "imagenet7 (7)"
    assert mine.in_distribution.templates == "mine.txt (2)"
    given = evaluate(model=small, datasets=[str(colors)], templates=same).in_distribution
    assert given.metrics == mine.in_distribution.metrics != named.metrics


def test_predictions_are_written(small, colors, tmp_path):
    output = tmp_path / "out"
    found = evaluate(model=small, datasets=[str(colors)], keep_predictions=True, output=output)
    written = Predictions.read_jsonl(output / "predictions" / "colors.jsonl")
    assert written == found.in_distribution.predictions
    assert len(written) == found.in_distribution.images


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


def test_references_that_do_not_fit(run, small, colors, tmp_path):
    shift = str(write_images(tmp_path / "shift", 9))
    evaluate(model=small, datasets=[str(colors)], output=tmp_path / "alone")
    evaluate(run=run, output=tmp_path / "adapted")
    for reference, datasets, message in (
        ("alone", [str(colors), shift], "no result on dataset 'shift', split 'test'"),
        ("alone", [str(colors)], "needs a shift"),
        ("adapted", [str(colors), shift], "is of an adapted model"),
        ("shift", [str(colors), shift], "cannot read .*metrics.json"),
    ):
        with pytest.raises(VlkrError, match=message):
            evaluate(model=small, datasets=datasets, reference=[tmp_path / reference])


def test_json_is_all_there_is_on_stdout(run, capsys):
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["results"] == json.loads((run / "metrics.json").read_text())["results"]
    names = {"acc1", "acc5", "mean_per_class_recall", "f1", "ece", "nll"}
    assert set(printed["results"][0]["metrics"]) == names


def test_table_names_what_the_numbers_depend_on(run, capsys):
    assert main(["evaluate", "--run", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("colors", "adapter kradapter", "shots 4", "seed 1", "split test", "default (1)"):
        assert part in printed


def test_output_is_written_and_not_replaced_unasked(small, colors, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["evaluate", "--model", small, "--datasets", str(colors), "--output", str(output)]
    assert main(arguments) == 0
    files = {"metrics.json", "report.md", "confusion.json", "reliability.png"}
    assert set(tree(output)) == files
    with Image.open(output / "reliability.png") as figure:
        assert figure.size[0] > 300
    counts = json.loads((output / "confusion.json").read_text())["colors"]
    found = json.loads((output / "metrics.json").read_text())["results"][0]
    assert counts["class_names"] == ["blue", "green", "red"]
    assert sum(map(sum, counts["counts"])) == found["images"]
    before = tree(output)
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert tree(output) == before
    assert main([*arguments, "--force"]) == 0
    assert tree(output) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_told_in_one_line(small, tmp_path, capsys, workers):
    root = write_images(tmp_path / "d", per_class=2, splits=["test"])
    (root / "test" / "red" / "1.png").write_bytes(b"garbage")
    arguments = ["evaluate", "--model", small, "--datasets", str(root)]
    assert main([*arguments, "--num-workers", str(workers)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    reason, _, hint = error.partition("; ")
    assert reason == "vlkr: error: sample 'red/1.png' is not an image in a known format"
    assert hint == "max_bad lets such samples be skipped"


def test_damaged_shard_is_told(small, tmp_path):
    root = write_shards(tmp_path / "d")
    shard = root / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(VlkrError, match=r"cannot read shard .*test/1\.tar"):
        evaluate(model=small, datasets=[str(root)])


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


def test_the_test_fraction_is_the_runs_unless_it_is_given(run, colors):
    def images(**options):
        return evaluate(
            run=run, datasets=[str(colors)], device="cpu", **options
        ).in_distribution.images

    fraction = RunFolder.open(run).config.data.test_fraction
    assert images() == images(test_fraction=fraction)
    assert images(test_fraction=0.9) > images() > images(test_fraction=0.1)
