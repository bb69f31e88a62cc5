import dataclasses
import io
import json
import tarfile

import open_clip
import pytest
import torch
import yaml
from helpers import ROOT, tree, write_images, write_shards
from PIL import Image

from vlkr.cli import main
from vlkr.datasets import load_dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.runs import load_run
from vlkr.evaluation.zero_shot import evaluate, evaluate_bundle
from vlkr.hashing import weights_hash
from vlkr.models.clip import load_clip


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
    result = evaluate(model=small, datasets=[name], shifts=False).home
    assert result.images == len(labels) == card["splits"]["test"]
    predicted = logits.argmax(1)
    assert result.metrics["acc1"] == pytest.approx(
        (predicted == labels).double().mean().item(), abs=1e-6
    )
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert result.metrics["acc5"] == pytest.approx(top5, abs=1e-6)
    recall = torch.stack([(predicted == c)[labels == c].double().mean() for c in labels.unique()])
    assert result.metrics["mean_per_class_recall"] == pytest.approx(recall.mean().item(), abs=1e-6)


def test_workers_and_batches_change_nothing(small, colors):
    dataset, bundle = load_dataset(colors), load_clip(small)
    expected = evaluate_bundle(bundle, [dataset], batch_size=64)
    for options in ({"num_workers": 2}, {"batch_size": 1}, {"batch_size": 5, "num_workers": 2}):
        found = evaluate_bundle(bundle, [dataset], **options)
        assert found.home.images == expected.home.images
        assert found.home.metrics == pytest.approx(expected.home.metrics, abs=1e-5)


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
    own = evaluate(model=small, datasets=[str(colors)]).home
    same = evaluate(model=small, datasets=[str(colors)], templates=["a photo of a {c}."]).home
    other = evaluate(model=small, datasets=[str(colors)], templates=["{c}", "{c}!"]).home
    assert same.metrics == own.metrics
    assert (own.templates, other.templates) == ("default (1)", "given (2)")


def test_adapted_model_is_measured_and_comes_back(run, small, colors):
    bundle, _ = load_run(run)
    base = load_clip(small)
    found = evaluate_bundle(bundle, [load_dataset(colors)])
    plain = evaluate_bundle(base, [load_dataset(colors)])
    assert found.home.metrics != plain.home.metrics
    assert weights_hash(bundle.model) == base.weights_hash
    assert evaluate_bundle(bundle, [load_dataset(colors)]).home == found.home


def test_run_is_measured_on_its_own_data(run):
    metrics = json.loads((run / "metrics.json").read_text())
    found = evaluate(run=run)
    assert found.to_json()["results"] == metrics["results"]
    assert found.context["shots"] == 4
    assert found.context["adapter"] == "kradapter"
    assert found.context["weights_sha256"] == metrics["weights_sha256"]


def test_json_is_all_there_is_on_stdout(run, capsys):
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["results"] == json.loads((run / "metrics.json").read_text())["results"]
    assert set(printed["results"][0]["metrics"]) == {
        "acc1",
        "acc5",
        "mean_per_class_recall",
        "ece",
    }


def test_table_names_what_the_numbers_depend_on(run, capsys):
    assert main(["evaluate", "--run", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("colors", "adapter kradapter", "shots 4", "seed 1", "split test", "default (1)"):
        assert part in printed


def test_output_is_written_and_not_replaced_unasked(small, colors, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["evaluate", "--model", small, "--datasets", str(colors), "--output", str(output)]
    assert main(arguments) == 0
    assert set(tree(output)) == {"metrics.json", "report.md"}
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
    assert error == "vlkr: error: sample 'red/1.png' is no image in a format that is known"


def test_damaged_shard_is_told(small, tmp_path):
    root = write_shards(tmp_path / "d")
    shard = root / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(VlkrError, match=r"cannot read shard .*test/1\.tar"):
        evaluate(model=small, datasets=[str(root)])


def test_missing_samples_of_a_card_are_told(small):
    fonts = load_dataset("digits-fonts")
    more = dataclasses.replace(fonts, sizes={"test": 161})
    with pytest.raises(VlkrError, match=r"'digits-fonts' has 160 images .* expected 161"):
        evaluate_bundle(load_clip(small), [more])


def test_split_without_images_is_told(small, tmp_path):
    dataset = load_dataset(write_images(tmp_path / "d"))
    nothing = dataclasses.replace(dataset, splits={"test": []})
    with pytest.raises(VlkrError, match="has no images in its split 'test'"):
        evaluate_bundle(load_clip(small), [nothing])


def test_weights_that_are_not_finite_are_told(small, colors):
    bundle = load_clip(small)
    bundle.model.visual.proj.data[0, 0] = torch.nan
    with pytest.raises(VlkrError, match="logits on colors are not finite"):
        evaluate_bundle(bundle, [load_dataset(colors)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --model NAME or --run DIR"),
        ({"model": "SMALL", "run": "RUN"}, "either --model NAME or --run DIR"),
        ({"run": "RUN", "pretrained": "openai"}, "--pretrained goes with --model"),
        ({"model": "SMALL", "batch_size": 0}, "batch size 0 is too small"),
        ({"model": "SMALL", "num_workers": -1}, "number of workers -1 is negative"),
        ({"model": "SMALL", "device": "gpu"}, "device 'gpu' is not available"),
        ({"model": "SMALL", "split": "val"}, "has no split 'val'"),
        ({"model": "SMALL", "datasets": ["digitz"]}, "did you mean digits"),
        ({"model": "SMALL", "templates": []}, "list of templates is empty"),
        ({"model": "SMALL", "templates": ["x"]}, "lacks the placeholder"),
        ({"model": "SMALL", "output": ROOT / "pyproject.toml"}, "is a file"),
    ],
)
def test_wrong_options(options, message, small, run):
    names = {"SMALL": small, "RUN": run}
    options = {k: names.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(VlkrError, match=message):
        evaluate(**options)
