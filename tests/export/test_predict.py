import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import COLORS, color_image, tree
from PIL import Image
from safetensors.torch import load_file, save_file

from vlkr.adapters import merge_adapters
from vlkr.cli import main
from vlkr.export.export import export
from vlkr.export.predict import predict
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts
from vlkr.runs import RunFolder

NAMES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven images at different depths, of different kinds, and a file that is no image."""
    root = tmp_path_factory.mktemp("photos")
    (root / "b" / "deeper").mkdir(parents=True)
    for i, color in enumerate([*COLORS, *COLORS]):
        path = root / ("b/deeper" if i % 2 else "b") / f"{i}-{color}.png"
        path.write_bytes(color_image(color, i))
    Image.new("L", (9, 30), 200).save(root / "gray.jpg")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory, run):
    output = tmp_path_factory.mktemp("models") / "export"
    export(run, output)
    return output


def paths_of(root):
    return sorted(p for p in root.rglob("*") if p.suffix in (".png", ".jpg") and p.name[0] != ".")


@torch.no_grad()
def expected(run, paths):
    """Probabilities by the merged model."""
    folder = RunFolder.open(run)
    bundle, dataset = folder.load_model(), folder.dataset()
    merge_adapters(bundle.model)
    images = [Image.open(path).convert("RGB") for path in paths]
    pixels = torch.stack([bundle.preprocess(image) for image in images])
    prompts = tokenize_prompts(bundle.tokenizer, dataset.class_names, dataset.templates)
    embeddings = class_embeddings(bundle.model, prompts)
    features = bundle.model.encode_image(pixels, normalize=True)
    return (bundle.model.logit_scale.exp() * features @ embeddings.T).softmax(1)


def lines_of(capsys, *arguments):
    status = main(["predict", *map(str, arguments), "--format", "jsonl"])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_classifies_a_folder(run, model, photos, batch_size, capsys):
    options = ["--model", model, photos, "--batch-size", batch_size, "--top-k", 3]
    status, lines = lines_of(capsys, *options)
    assert status == 0
    paths = paths_of(photos)
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    for line, wanted in zip(lines, expected(run, paths), strict=True):
        assert line["label"] == NAMES[wanted.argmax()] == line["top"][0]["label"]
        found = {entry["label"]: entry["probability"] for entry in line["top"]}
        for name, probability in zip(NAMES, wanted.tolist(), strict=True):
            assert found[name] == pytest.approx(probability, abs=2e-5)
        ordered = [entry["probability"] for entry in line["top"]]
        assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize(
    "name",
    [
        "transformers",
        "adapter",
        pytest.param("onnx", marks=pytest.mark.slow),
        pytest.param("torch", marks=pytest.mark.slow),
    ],
)
def test_every_format_says_the_same(name, run, photos, tmp_path, capsys):
    export(run, tmp_path / "out", format=name)
    capsys.readouterr()
    status, lines = lines_of(capsys, photos, "--model", tmp_path / "out")
    assert status == 0
    wanted = expected(run, paths_of(photos))
    assert [line["label"] for line in lines] == [NAMES[i] for i in wanted.argmax(1)]
    for line, probability in zip(lines, wanted.amax(1).tolist(), strict=True):
        assert line["probability"] == pytest.approx(probability, abs=1e-4)


def test_timm_without_text(vit_run, digit_images, tmp_path, capsys):
    export(vit_run, tmp_path / "out", format="timm")
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(digit_images[:5]):
        image.save(tmp_path / "photos" / f"{i}.png")
    capsys.readouterr()
    status, lines = lines_of(capsys, "--model", tmp_path / "out", tmp_path / "photos")
    assert status == 0
    folder = RunFolder.open(vit_run)
    bundle = folder.load_model()
    pixels = torch.stack([bundle.preprocess(image) for image in digit_images[:5]])
    with torch.no_grad():
        features = bundle.model.encode_image(pixels, normalize=True)
        logits = bundle.model.logit_scale.exp() * features @ bundle.head().T
    best = logits.softmax(1).max(1)
    names = folder.dataset().class_names
    assert [line["label"] for line in lines] == [names[i] for i in best.indices]
    found = torch.tensor([line["probability"] for line in lines])
    torch.testing.assert_close(found, best.values, atol=1e-5, rtol=1e-4)


def test_files_are_taken_in_their_order_and_twice_if_told(model, photos, capsys):
    paths = [photos / "gray.jpg", photos / "b" / "0-red.png", photos / "gray.jpg"]
    _, lines = lines_of(capsys, "--model", model, *paths)
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    assert lines[0] == lines[2]
    assert "top" not in lines[0]


def test_csv(run, model, photos, capsys):
    assert main(["predict", "--model", str(model), str(photos), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    wanted = expected(run, paths_of(photos))
    assert list(rows[0]) == ["image", "label", "probability", "error"]
    assert [row["label"] for row in rows] == [NAMES[i] for i in wanted.argmax(1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        wanted.amax(1).tolist(), abs=1e-4
    )


def test_table_names_its_model(model, photos, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["predict", "--model", str(model), str(photos)]) == 0
    printed = capsys.readouterr().out
    assert "7 images" in printed
    assert all(str(path) in printed for path in paths_of(photos))
    manifest = json.loads((model / "vlkr_export.json").read_text())
    assert f"weights_sha256 {manifest['weights_sha256'][:12]}" in printed
    assert "model export, format open_clip, dtype float32, alpha 1.0" in printed


def test_json_is_for_programs(model, photos, capsys):
    assert main(["predict", "--model", str(model), str(photos), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["failed"], len(found["predictions"])) == (7, 0, 7)
    assert found["adapter"] == "kradapter"


@pytest.mark.parametrize("shown", ["table", "jsonl", "csv"])
def test_an_unreadable_image_is_told_in_its_row(
    shown, model, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")
    broken = tmp_path / "broken.png"
    broken.write_bytes(color_image("red", 1)[:150])
    good = photos / "gray.jpg"
    arguments = ["predict", "--model", str(model), str(good), str(broken), str(good)]
    assert main([*arguments, "--format", shown]) == 1
    printed = capsys.readouterr().out
    assert "is a corrupt image" in printed
    if shown == "jsonl":
        first, second, third = map(json.loads, printed.splitlines())
        assert set(second) == {"image", "error"}
        assert first == third
    elif shown == "csv":
        first, second, third = csv.DictReader(printed.splitlines())
        assert (second["label"], second["probability"]) == ("", "")
        assert first == third
    else:
        assert "3 images, 1 of them could not be read" in printed


def test_nothing_but_unreadable_images(model, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"garbage")
    status, lines = lines_of(capsys, "--model", model, tmp_path)
    assert status == 1
    assert lines == [
        {"image": str(tmp_path / "a.png"), "error": "is not an image in a known format"}
    ]


@pytest.mark.parametrize(
    ("name", "options"), [("x.csv", []), ("x.jsonl", []), ("x", ["--format", "csv"])]
)
def test_written_to_a_file(name, options, model, photos, tmp_path, capsys):
    output = tmp_path / name
    arguments = ["predict", "--model", str(model), str(photos), "--output", str(output), *options]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"Written to {output}" in printed.replace("\n", "")
    first = output.read_text().splitlines()[0]
    assert (
        first == "image,label,probability,error" if "csv" in str(arguments) else json.loads(first)
    )
    before = output.read_bytes()
    assert main(arguments) == 2
    assert "exists already; name another file, or --force replaces it" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert output.read_bytes() == before
    assert tree(tmp_path) == {name: before}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model MODEL /nowhere", "no file or folder /nowhere"),
        ("--model MODEL EMPTY", "no image in EMPTY, expected .jpg"),
        ("--model /nowhere PHOTOS", "no export at /nowhere: vlkr_export.json is missing"),
        ("--model MODEL PHOTOS --top-k 4", "top-k 4 is too large, the model knows 3 classes"),
        ("--model MODEL PHOTOS --top-k 0", "top-k 0 is too small, expected at least 1"),
        ("--model MODEL PHOTOS --batch-size 0", "batch size 0 is too small"),
        ("--model MODEL PHOTOS --output EMPTY/x.json", "x.json: name it .csv or .jsonl"),
        ("--model MODEL PHOTOS --format xml", "unknown format 'xml'; known: table, jsonl, csv"),
        ("--model MODEL PHOTOS --device abacus", "device 'abacus' is not available"),
        ("--model MODEL", "--images missing"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, model, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(model), "PHOTOS": str(photos), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        arguments, message = arguments.replace(name, place), message.replace(name, place)
    assert main(["predict", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vlkr_export.json", b"{}", "is damaged: its format is"),
        ("vlkr_export.json", b"[]", "holds a list, expected a mapping"),
        ("vlkr_export.json", b'{"format": "open_clip", "dtype": 3}', "its dtype is 3"),
        ("class_embeddings.safetensors", b"\0" * 9, "is damaged: SafetensorError"),
        ("open_clip_model.safetensors", b"\0" * 9, "cannot load model"),
    ],
)
def test_a_damaged_export_is_told(name, content, message, model, photos, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(content if path.name == name else path.read_bytes())
    assert main(["predict", "--model", str(copy), str(photos)]) == 2
    assert message in capsys.readouterr().err


def test_an_export_of_an_unknown_format_is_told(model, photos, tmp_path, capsys):
    manifest = json.loads((model / "vlkr_export.json").read_text())
    (tmp_path / "vlkr_export.json").write_text(json.dumps(manifest | {"format": "floppy"}))
    assert main(["predict", "--model", str(tmp_path), str(photos)]) == 2
    assert "unknown format 'floppy'" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_told(model, photos, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "copy")
    weights = load_file(model / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = float("nan")
    save_file(weights, tmp_path / "copy" / "open_clip_model.safetensors")
    assert main(["predict", "--model", str(tmp_path / "copy"), str(photos)]) == 2
    assert "outputs are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("transformers", "config.json"),
        ("transformers", "preprocessor_config.json"),
        pytest.param("onnx", "classifier.onnx", marks=pytest.mark.slow),
        pytest.param("torch", "classifier.pt2", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_file_of_another_format_is_told(name, file, run, photos, tmp_path, capsys):
    export(run, tmp_path / "out", format=name)
    capsys.readouterr()
    for content in (b"", b"[]"):
        (tmp_path / "out" / file).write_bytes(content)
        assert main(["predict", "--model", str(tmp_path / "out"), str(photos)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path / "out") in line
        assert "damaged" in line


def test_progress_is_for_terminals(model, photos, capsys, monkeypatch):
    arguments = ["predict", "--model", str(model), str(photos), "--format", "csv"]
    assert main(arguments) == 0
    plain = capsys.readouterr()
    assert plain.err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "7 of 7 images" in shown.err
    assert shown.out == plain.out


def test_an_adapter_refuses_another_base(run, photos, tmp_path, capsys):
    export(run, tmp_path / "out", format="adapter")
    manifest = tmp_path / "out" / "vlkr_export.json"
    changed = json.loads(manifest.read_text()) | {"base_sha256": "0" * 64}
    manifest.write_text(json.dumps(changed))
    capsys.readouterr()
    assert main(["predict", "--model", str(tmp_path / "out"), str(photos)]) == 2
    assert "was made for a different base" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_and_a_process_of_its_own(model, photos, tmp_path, capsys):
    _, wanted = lines_of(capsys, "--model", model, photos)
    command = [sys.executable, "-m", "vlkr", "predict", "--model", model, photos]
    done = subprocess.run(
        [*map(str, command), "--num-workers", "2", "--batch-size", "2", "--format", "jsonl"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    for line, other in zip(map(json.loads, done.stdout.splitlines()), wanted, strict=True):
        assert line == other | {"probability": pytest.approx(other["probability"], abs=2e-5)}


@pytest.mark.parametrize("flag", ["--force", "--json"])
def test_a_flag_may_stand_before_the_images(flag, model, photos, capsys):
    arguments = ["--model", str(model), "--format", "csv", flag, str(photos / "gray.jpg")]
    assert main(["predict", *arguments]) == 0
    assert "gray.jpg" in capsys.readouterr().out


def test_no_images_are_no_predictions(model):
    assert predict(model, []).text() == "image,label,probability,error\n"
