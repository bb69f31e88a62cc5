"""The whole road with models and images of the sizes that people use."""

import csv
import json
import tempfile
from pathlib import Path

import open_clip
import pytest
from helpers import REAL, write_images
from safetensors.torch import load_file, save_file

from vlkr.cli import main

pytestmark = pytest.mark.slow


def results(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def large_folder():
    """Removed at once, for pytest keeps its own folders of the last three sessions."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_vit_b_32_from_a_path_of_weights(large_folder, capsys):
    weights, run, out = (large_folder / name for name in ("clip.safetensors", "run", "export"))
    model = open_clip.create_model("ViT-B-32")
    save_file(model.state_dict(), weights)
    del model
    images = write_images(large_folder / "colors", per_class=6)
    adapted = results(
        capsys,
        *("adapt", "--model", "ViT-B-32", "--pretrained", weights, "--data.root", images),
        *("--data.shots", 1, "--data.batch-size", 2, "--data.min-steps-per-epoch", 2),
        *("--trainer.epochs", 1, "--trainer.progress=false", "--output", run),
    )
    measured = results(capsys, "evaluate", "--run", run)
    assert measured["results"] == adapted["results"]
    assert measured["results"][0]["pretrained"] == str(weights)
    exported = results(capsys, "export", "--run", run, "--output", out)
    assert exported["parity"]["min_image_cosine"] >= 0.99999
    assert exported["parity"]["min_text_cosine"] >= 0.99999
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    assert type(plain) is open_clip.CLIP
    assert open_clip.get_model_config(f"local-dir:{out}")["vision_cfg"]["patch_size"] == 32


@pytest.fixture
def real():
    if not (REAL / "clip_deit_tiny").is_dir() or not (REAL / "pacs").is_dir():
        pytest.skip(f"no real weights and images at {REAL}")
    return REAL


@pytest.mark.real
def test_pacs_photos_with_a_pretrained_tower(real, tmp_path, capsys):
    photos, sketches = (real / "pacs" / domain for domain in ("photo", "sketch"))
    options = ("--test-fraction", 0.25, "--datasets", photos, sketches)
    before = results(capsys, "evaluate", "--model", real / "clip_deit_tiny", *options)
    run = tmp_path / "run"
    results(
        capsys,
        *("adapt", "--model", real / "clip_deit_tiny", "--data.root", photos, "--data.shots", 4),
        *("--data.test-fraction", 0.25, "--data.batch-size", 14, "--optimizer.lr", 0.003),
        *("--data.min-steps-per-epoch", 6, "--trainer.epochs", 2, "--trainer.progress=false"),
        *("--adapter.towers", "visual", "--adapter.blocks", -1, "--output", run),
    )
    after = results(capsys, "evaluate", "--run", run, "--datasets", photos, sketches)
    assert [r["images"] for r in after["results"]] == [r["images"] for r in before["results"]]
    home, shifted = ([r["metrics"]["acc1"] for r in e["results"]] for e in (before, after))
    assert home[0] > 2 / 7  # twice chance
    assert shifted[0] > home[0]
    with (run / "logs" / "csv" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    exported = results(capsys, "export", "--run", run, "--output", tmp_path / "out")
    assert exported["parity"]["images"] == 64
    assert exported["parity"]["min_image_cosine"] >= 0.99999
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert set(exported) == set(load_file(real / "clip_deit_tiny" / "open_clip_model.safetensors"))
