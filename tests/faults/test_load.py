"""Loads of a size that counts: memory stays flat, time within bounds, numbers right."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from helpers import COLORS, ROOT, color_image, write_tar
from PIL import Image

from vlkr.cli import main
from vlkr.comparison.engine import run_cells
from vlkr.comparison.plan import Cell
from vlkr.comparison.results import CellFolder
from vlkr.evaluation.evaluate import _TEXTS_PER_BATCH
from vlkr.files import read_json, write_json
from vlkr.models.loading import load_model
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts

pytestmark = [pytest.mark.faults, pytest.mark.slow]

MANY, FEW = 1_000_000, 100_000
PER_SHARD = 50_000
BLOCK = tarfile.BLOCKSIZE


@pytest.fixture
def loaded(tmp_path):
    """Runs a function of :mod:`faults.load` in a fresh process."""

    def run(function, *arguments):
        result = tmp_path / "result.json"
        result.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "faults.load", result, function, *map(str, arguments)],
            cwd=ROOT / "tests",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(result.read_text())

    return run


def numbered_samples(numbers):
    """Tar blocks of samples whose key is their number: a pixel of gray, and a class of ten.

    Written with numpy, for the standard library would take minutes for a million.
    """
    pixel = b"P6 1 1 255\n...".ljust(BLOCK, b"\0")
    label = b"0".ljust(BLOCK, b"\0")
    parts = []
    for extension, content, size in (("ppm", pixel, 14), ("cls", label, 1)):
        entry = tarfile.TarInfo(f"00000000.{extension}")
        entry.size = size
        parts += [entry.tobuf(), content]
    rows = np.tile(np.frombuffer(b"".join(parts), np.uint8), (len(numbers), 1))
    rows[:, BLOCK + 11 : BLOCK + 14] = (numbers % 251)[:, None]
    rows[:, 3 * BLOCK] = ord("0") + numbers % 10
    digits = ord("0") + numbers[:, None] // 10 ** np.arange(7, -1, -1) % 10
    for header in (rows[:, :BLOCK], rows[:, 2 * BLOCK : 3 * BLOCK]):
        header[:, :8] = digits
        header[:, 148:156] = ord(" ")
        octal = (header.sum(1, dtype=np.int64)[:, None] >> 3 * np.arange(5, -1, -1)) & 7
        header[:, 148:154] = ord("0") + octal
        header[:, 154] = 0
    return rows.tobytes()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of a million samples, and one of those of its first shards."""
    root = tmp_path_factory.mktemp("shards")
    for name, count in (("many", MANY), ("few", FEW)):
        (root / name / "test").mkdir(parents=True)
        (root / name / "classnames.txt").write_text("".join(f"thing {i}\n" for i in range(10)))
        (root / name / "test" / "nshards.txt").write_text(str(count // PER_SHARD))
    for i in range(MANY // PER_SHARD):
        numbers = np.arange(i * PER_SHARD, (i + 1) * PER_SHARD)
        path = root / "many" / "test" / f"{i}.tar"
        path.write_bytes(numbered_samples(numbers) + bytes(2 * BLOCK))
        if i < FEW // PER_SHARD:
            (root / "few" / "test" / path.name).hardlink_to(path)
    yield root
    shutil.rmtree(root)


def each_once(count):
    """Sums over the samples' numbers, in closed form."""
    return {
        "images": count,
        "labels": count // 10 * 45,
        "keys": count * (count - 1) // 2,
        "squares": (count - 1) * count * (2 * count - 1) // 6,
    }


@pytest.mark.parametrize(
    ("name", "function"), [("evaluation", "evaluate_stream"), ("training", "train_stream")]
)
def test_a_million_samples(loaded, shards, small, case, name, function):
    more = [PER_SHARD] if name == "training" else [small]
    with case(f"load: a million samples, {name}"):
        few = loaded(function, shards / "few", *more)
        many = loaded(function, shards / "many", *more)
        case.figure(
            f"{MANY:,} samples for {name}: {many['seconds']:.0f} s, peak memory "
            f"{many['peak_mib']:.0f} MiB, {few['peak_mib']:.0f} MiB for {FEW:,}"
        )
        assert few.items() >= each_once(FEW).items()
        assert many.items() >= each_once(MANY).items()
        assert many.get("drawn", 160) == 160
        assert many["peak_mib"] < 1.1 * few["peak_mib"]


def test_a_million_samples_are_told_apart(loaded, shards, case):
    """One process reads all shards as one source, which keeps in mind what came before."""
    with case("load: a million samples, fingerprint"):
        few = loaded("fingerprint_stream", shards / "few")
        many = loaded("fingerprint_stream", shards / "many")
        case.figure(
            f"{MANY:,} samples as one source: {many['seconds']:.0f} s, peak memory "
            f"{many['peak_mib']:.0f} MiB, {few['peak_mib']:.0f} MiB for {FEW:,}"
        )
        assert many["peak_mib"] < 1.1 * few["peak_mib"]


def test_a_thousand_classes_and_eighty_templates(loaded, small, case):
    num_classes, (few, many) = 1000, (8, 80)
    with case("load: 1,000 classes x 80 templates, memory"):
        taken = {number: loaded("embed", small, num_classes, number) for number in (few, many)}
        tokens = taken[many]["tokens_mib"] - taken[few]["tokens_mib"]
        more = taken[many]["more_mib"] - taken[few]["more_mib"]
        case.figure(
            f"{num_classes:,} classes x {many} templates: {taken[many]['more_mib']:.1f} MiB beside "
            f"the model and the tokens, {taken[few]['more_mib']:.1f} MiB with {few}"
        )
        assert more <= tokens
    with case("load: 1,000 classes x 80 templates, numbers"), torch.inference_mode():
        bundle = load_model(small)
        names = [f"thing {i}" for i in range(num_classes)]
        templates = [f"photo {i} of a {{c}}." for i in range(many)]
        prompts = tokenize_prompts(bundle.tokenizer, names, templates)
        found = class_embeddings(bundle.model, prompts, _TEXTS_PER_BATCH)
        for name, embedding in zip(names, found, strict=True):
            tokens = bundle.tokenizer([template.replace("{c}", name) for template in templates])
            mean = bundle.model.encode_text(tokens, normalize=True).mean(0)
            torch.testing.assert_close(embedding, mean / mean.norm(), rtol=0, atol=1e-6)


@pytest.fixture
def many_sets(tmp_path, small):
    """200 folders and sets of shards with classes dealt at random, and how many of each are right.

    They hold some of the same images, so that plain open_clip tells each of them only once.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(small)
    tokenizer = open_clip.get_tokenizer(small)
    names = sorted(COLORS)
    images = [color_image(name, i) for name in names for i in range(20)]
    with torch.inference_mode():
        texts = model.encode_text(tokenizer([f"a photo of a {n}." for n in names]), normalize=True)
        pixels = [preprocess(Image.open(io.BytesIO(image))) for image in images]
        logits = model.eval().encode_image(torch.stack(pixels), normalize=True) @ texts.T
    predicted = logits.argmax(1).tolist()
    generator = np.random.default_rng(0)
    right = {}
    for k in range(200):
        chosen = generator.choice(len(images), 3 * len(names), replace=False).tolist()
        labels = [j % len(names) for j in range(len(chosen))]
        folder = tmp_path / "sets" / f"set{k}"
        right[folder] = sum(predicted[i] == label for i, label in zip(chosen, labels, strict=True))
        if k % 2:
            (folder / "test").mkdir(parents=True)
            (folder / "classnames.txt").write_text("\n".join(names) + "\n")
            samples = [(f"s{i}", images[i], y) for i, y in zip(chosen, labels, strict=True)]
            write_tar(folder / "test" / "0.tar", samples)
            continue
        for i, label in zip(chosen, labels, strict=True):
            path = folder / "test" / names[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images[i])
    return right


def test_two_hundred_datasets(loaded, small, many_sets, tmp_path, case):
    def run(folders, output):
        datasets = f"[{', '.join(map(str, folders))}]"
        options = [f"--model={small}", f"--datasets={datasets}", f"--output={output}"]
        return loaded("command", "evaluate", *options, "--device=cpu")

    folders = list(many_sets)
    with case("load: 200 datasets in one evaluation"):
        run(folders[:2], tmp_path / "warm")
        half = run(folders[:100], tmp_path / "half")
        whole = run(folders, tmp_path / "whole")
        case.figure(
            f"200 datasets in one evaluation: {whole['seconds']:.0f} s, peak memory "
            f"{whole['peak_mib']:.0f} MiB, {half['peak_mib']:.0f} MiB for 100"
        )
        found = read_json(tmp_path / "whole" / "metrics.json")["results"]
        assert [result["dataset"] for result in found] == [folder.name for folder in folders]
        for folder, result in zip(folders, found, strict=True):
            assert result["images"] == 9
            assert result["metrics"]["acc1"] == pytest.approx(many_sets[folder] / 9, abs=1e-6)
        assert whole["peak_mib"] < 1.1 * half["peak_mib"]
        assert whole["seconds"] < 120


def test_a_thousand_finished_cells(loaded, small, colors, tmp_path, case):
    """Cells that are copies of one of their method, with validation that favours one setting."""
    output = tmp_path / "grid"
    lrs = [round(0.001 * (i + 1), 3) for i in range(10)]
    best = lrs[6]
    options = {
        "model": small,
        "output": output,
        "methods": "[kradapter, lora]",
        "lrs": lrs,
        "seeds": list(range(1, 11)),
        "shots": "[1, 2, 4, 8, 16]",
        "data.root": colors,
        "data.batch-size": 8,
        "data.min-steps-per-epoch": 3,
        "trainer.epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.progress": "false",
    }
    arguments = ["compare", *(f"--{key}={value}" for key, value in options.items())]
    assert main([*arguments, "--jobs=0"]) == 2  # nothing is finished; the plan is written
    planned = [Cell.from_json(cell) for cell in read_json(output / "plan.json")["cells"]]
    assert len(planned) == 1000
    real = {}
    for cell in planned:
        folder = output / "cells" / cell.id
        if cell.config.adapter.name not in real:
            run_cells(output, [cell.id])
            real[cell.config.adapter.name] = folder
        original = real[cell.config.adapter.name]
        if folder != original:
            shutil.copytree(original, folder)
        write_json(CellFolder(folder).config, {"hash": cell.hash, "cell": cell.to_json()})
        found = read_json(CellFolder(original).result)
        score = 0.5 + 0.4 * (cell.config.optimizer.lr == best)
        write_json(CellFolder(folder).result, {**found, "hash": cell.hash, "val_acc1": score})
    with case("load: 1,000 finished cells"):
        taken = loaded("command", *arguments, "--jobs=0")
        case.figure(
            f"1,000 finished cells: their report in {taken['command_seconds']:.1f} s, with what "
            f"Python imports {taken['seconds']:.1f} s"
        )
        with (output / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 1000
        assert {row["lr"] for row in rows if row["chosen"] == "True"} == {str(best)}
        assert len(list((output / "clip_benchmark").iterdir())) == 2 * 5 * 10
        assert taken["command_seconds"] < 30
