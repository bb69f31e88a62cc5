import csv
import json
import shutil
import subprocess
import sys

import pytest
from export.outputs import outputs
from helpers import COLORS, color_image, tree
from PIL import Image
from safetensors.torch import load_file, save_file

from vlkr.cli import main
from vlkr.datasets import load_dataset
from vlkr.export.predict import predict

NAMES = ("blue", "green", "red")
TRACED = [pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "torch")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven images at different depths, of different kinds, and a file that is not an image."""
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
def model(run, exported):
    return exported(run).folder


@pytest.fixture(scope="module")
def paths(photos):
    return sorted(p for p in photos.rglob("*") if p.suffix in (".png", ".jpg") and p.name[0] != ".")


@pytest.fixture(scope="module")
def expected(run, paths):
    """Probabilities by the adapted model."""
    return outputs(run, [Image.open(path).convert("RGB") for path in paths]).logits.softmax(1)


def run_predict(capsys, *words):
    """Exit status, and what is printed."""
    capsys.readouterr()
    status = main(["predict", *map(str, words)])
    return status, capsys.readouterr()


def lines_of(capsys, *words):
    status, captured = run_predict(capsys, *words, "--format=jsonl")
    return status, [json.loads(line) for line in captured.out.splitlines()]


# What is predicted


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_classifies_a_folder(model, photos, paths, expected, batch_size, capsys):
    options = ["--model", model, photos, "--batch-size", batch_size, "--top-k", 3]
    status, lines = lines_of(capsys, *options)
    assert status == 0
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    for line, probabilities in zip(lines, expected, strict=True):
        assert line["label"] == NAMES[probabilities.argmax()] == line["top"][0]["label"]
        by_label = {entry["label"]: entry["probability"] for entry in line["top"]}
        assert [by_label[name] for name in NAMES] == pytest.approx(probabilities.tolist(), abs=2e-5)
        ordered = [entry["probability"] for entry in line["top"]]
        assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize("name", ["transformers", "adapter", "timm", *TRACED])
def test_each_format_predicts_what_the_adapted_model_does(
    name, run, vit_run, digit_images, exported, tmp_path, capsys
):
    source = vit_run if name == "timm" else run
    images = digit_images[:5]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    status, lines = lines_of(capsys, tmp_path, "--model", exported(source, name).folder)
    assert status == 0
    best = outputs(source, images).logits.softmax(1).max(1)
    names = load_dataset("digits").class_names if name == "timm" else NAMES
    assert [line["label"] for line in lines] == [names[i] for i in best.indices]
    probabilities = [line["probability"] for line in lines]
    assert probabilities == pytest.approx(best.values.tolist(), abs=1e-4)


def test_files_are_taken_in_their_order_and_repeatedly(model, photos, capsys):
    paths = [photos / "gray.jpg", photos / "b" / "0-red.png", photos / "gray.jpg"]
    _, lines = lines_of(capsys, "--model", model, *paths)
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    assert lines[0] == lines[2]
    assert "top" not in lines[0]
    assert predict(model, []).text() == "image,label,probability,error\n"


# How it is shown


def test_csv(model, photos, expected, capsys, monkeypatch):
    """Also the progress, which only a terminal shows."""
    words = ["--model", model, photos, "--format=csv"]
    status, captured = run_predict(capsys, *words)
    assert (status, captured.err) == (0, "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, shown = run_predict(capsys, *words)
    assert "7 of 7 images" in shown.err
    assert shown.out == captured.out
    rows = list(csv.DictReader(captured.out.splitlines()))
    assert list(rows[0]) == ["image", "label", "probability", "error"]
    assert [row["label"] for row in rows] == [NAMES[i] for i in expected.argmax(1)]
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == pytest.approx(expected.amax(1).tolist(), abs=1e-4)


def test_table_names_its_model(model, photos, paths, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, captured = run_predict(capsys, "--model", model, photos)
    assert status == 0
    assert "7 images" in captured.out
    assert all(str(path) in captured.out for path in paths)
    manifest = json.loads((model / "vlkr_export.json").read_text())
    assert f"weights_sha256 {manifest['weights_sha256'][:12]}" in captured.out
    assert "model export, format open_clip, dtype float32, alpha 1.0" in captured.out


@pytest.mark.parametrize("before", [True, False])
def test_json_is_for_programs(before, model, photos, capsys):
    words = ["--json", photos] if before else [photos, "--json"]  # a flag may precede the images
    status, captured = run_predict(capsys, "--model", model, *words)
    result = json.loads(captured.out)
    assert (result["images"], result["failed"], len(result["predictions"])) == (7, 0, 7)
    assert (status, result["adapter"]) == (0, "kradapter")


@pytest.mark.parametrize("shown", ["table", "jsonl", "csv"])
def test_an_unreadable_image_is_reported_in_its_row(
    shown, model, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")
    broken, good = tmp_path / "broken.png", photos / "gray.jpg"
    broken.write_bytes(b"garbage")
    status, (line,) = lines_of(capsys, "--model", model, broken)  # a batch without pixels
    assert status == 1
    assert line == {"image": str(broken), "error": "is not an image in a known format"}
    broken.write_bytes(color_image("red", 1)[:150])
    status, captured = run_predict(capsys, "--model", model, good, broken, good, "--format", shown)
    assert status == 1
    assert "is a corrupt image" in captured.out
    if shown == "jsonl":
        first, second, third = map(json.loads, captured.out.splitlines())
        assert set(second) == {"image", "error"}
        assert first == third
    elif shown == "csv":
        first, second, third = csv.DictReader(captured.out.splitlines())
        assert (second["label"], second["probability"]) == ("", "")
        assert first == third
    else:
        assert "3 images, 1 of them could not be read" in captured.out


@pytest.mark.parametrize(
    ("name", "options"), [("x.csv", []), ("x.jsonl", []), ("x", ["--format=csv"])]
)
def test_written_to_a_file(name, options, model, photos, tmp_path, capsys):
    output = tmp_path / name
    words = ["--model", model, photos, "--output", output, *options]
    status, captured = run_predict(capsys, *words)
    assert status == 0
    assert f"Written to {output}" in captured.out.replace("\n", "")
    first, *lines = output.read_text().splitlines()
    assert len(lines) == (6 if name == "x.jsonl" else 7)
    if name == "x.jsonl":
        assert json.loads(first)["label"] in NAMES
    else:
        assert first == "image,label,probability,error"
    before = output.read_bytes()
    status, captured = run_predict(capsys, *words)
    assert status == 2
    assert "exists already; name another file, or --force replaces it" in captured.err
    assert run_predict(capsys, *words, "--force")[0] == 0
    assert tree(tmp_path) == {name: before}


@pytest.mark.slow
def test_workers_and_a_process_of_its_own(model, photos, capsys):
    _, lines = lines_of(capsys, "--model", model, photos)
    code = (
        "import sys; from vlkr.cli import main; status = main(sys.argv[1:])\n"
        "optional = {'onnx', 'onnxruntime', 'vlkr.export.timm', 'vlkr.export.transformers'}\n"
        "print(*(optional & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    words = ["predict", "--model", model, photos, "--num-workers=2", "--batch-size=2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "--format=jsonl"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "\n")  # only what the format needs is imported
    for line, own in zip(map(json.loads, done.stdout.splitlines()), lines, strict=True):
        assert line == own | {"probability": pytest.approx(own["probability"], abs=2e-5)}


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model MODEL /nowhere", "no file or folder /nowhere"),
        ("--model MODEL EMPTY", "no image in EMPTY, expected .jpg"),
        ("--model /nowhere PHOTOS", "no export at /nowhere: vlkr_export.json is missing"),
        ("--model MODEL PHOTOS --top-k 4", "top-k 4 is too large, the model knows 3 classes"),
        ("--model MODEL PHOTOS --top-k 0", "top-k 0 is too small, expected at least 1"),
        ("--model MODEL PHOTOS --batch-size 0", "batch size 0 is too small"),
        ("--model MODEL PHOTOS --num-workers -1", "number of workers -1 is"),
        ("--model MODEL PHOTOS --output EMPTY/x.json", "x.json: name it .csv or .jsonl"),
        ("--model MODEL PHOTOS --format xml", "unknown format 'xml'; known: table, jsonl, csv"),
        ("--model MODEL PHOTOS --device abacus", "device 'abacus' is not available"),
        ("--model MODEL", "--images requires an argument"),
    ],
)
def test_wrong_input_is_one_line(words, message, model, photos, tmp_path, capsys):
    for name, place in {"MODEL": model, "PHOTOS": photos, "EMPTY": tmp_path}.items():
        words, message = (text.replace(name, str(place)) for text in (words, message))
    status, captured = run_predict(capsys, *words.split())
    assert (status, captured.out) == (2, "")
    (line,) = captured.err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("format_name", "file", "content", "message"),
    [
        ("open_clip", "vlkr_export.json", b"{}", "vlkr_export.json is damaged: its format is"),
        ("open_clip", "vlkr_export.json", b"[]", "holds a list, expected a mapping"),
        ("open_clip", "vlkr_export.json", {"dtype": 3}, "is damaged: its dtype is 3"),
        ("open_clip", "vlkr_export.json", {"class_names": ["a", 1]}, "its class_names.1 is 1"),
        ("open_clip", "vlkr_export.json", {"format": "floppy"}, "unknown format 'floppy'"),
        ("open_clip", "class_embeddings.safetensors", b"\0" * 9, "is damaged: SafetensorError"),
        ("open_clip", "open_clip_model.safetensors", b"\0" * 9, "cannot load model"),
        ("adapter", "vlkr_export.json", {"base_sha256": "0" * 64}, "made for a different base"),
        *(
            pytest.param(name, file, content, "damaged", marks=[pytest.mark.slow] * is_slow)
            for name, file, is_slow in (
                ("transformers", "config.json", False),
                ("transformers", "preprocessor_config.json", False),
                ("onnx", "classifier.onnx", True),
                ("torch", "classifier.pt2", True),
            )
            for content in (b"", b"[]")
        ),
    ],
)
def test_a_damaged_export_is_one_line(
    format_name, file, content, message, run, photos, exported, tmp_path, capsys
):
    copy = shutil.copytree(exported(run, format_name).folder, tmp_path / "copy")
    if isinstance(content, dict):
        content = json.dumps(json.loads((copy / file).read_text()) | content).encode()
    (copy / file).write_bytes(content)
    status, captured = run_predict(capsys, "--model", copy, photos)
    assert status == 2
    (line,) = captured.err.splitlines()
    assert message in line
    assert str(copy) in line or "unknown format" in line


def test_outputs_that_are_not_finite_are_an_error(model, photos, tmp_path, capsys):
    copy = shutil.copytree(model, tmp_path / "copy")
    weights = load_file(model / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = float("nan")
    save_file(weights, copy / "open_clip_model.safetensors")
    status, captured = run_predict(capsys, "--model", copy, photos)
    assert status == 2
    assert "outputs are not finite" in captured.err
