import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import time
from functools import partial

import numpy as np
import pytest
import torchvision
from helpers import COLORS, REAL, color_image, tree, write_images, write_shards
from PIL import Image

from vlkr.cli import main
from vlkr.datasets import DataConfig, Dataset, few_shot_split, load_dataset
from vlkr.datasets import packing as pack_module
from vlkr.datasets.images import shrink
from vlkr.datasets.packing import pack
from vlkr.datasets.samples import Sample
from vlkr.datasets.shards import tar_fields
from vlkr.errors import VlkrError
from vlkr.runtime import interleave_jobs, parallel_map


def facts(dataset):
    """Every sample of every split, without the shard's name."""
    return {
        split: sorted((s.key, s.image, s.label, s.domain) for s in source)
        for split, source in dataset.splits.items()
    }


def write_tree(root, per_class=6):
    for d, domain in enumerate(("art", "photo")):
        for c, name in enumerate(COLORS):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                image = color_image(name, 10_000 * d + 100 * c + i)
                (folder / f"pic.{i}.png").write_bytes(image)
    return root


@pytest.mark.parametrize("write", [write_images, write_shards, write_tree])
def test_samples_stay_what_they_were(tmp_path, write):
    root = write(tmp_path / "source")
    result = pack(str(root), tmp_path / "dest", samples_per_shard=5)
    before, after = load_dataset(root), load_dataset(tmp_path / "dest")
    assert facts(after) == facts(before)
    assert after.class_names == before.class_names
    assert after.templates == before.templates
    assert after.domains == before.domains
    for split, source in before.splits.items():
        number = len(list(source))
        shards = result.manifest["splits"][split]["shards"]
        assert len(shards) == -(-number // 5)
        assert sum(shard["samples"] for shard in shards) == number
        assert all(shard["samples"] == 5 for shard in shards[:-1])
        assert after.sizes[split] == number


def test_few_shot_splits_stay_the_same(tmp_path):
    root = write_tree(tmp_path / "source", per_class=12)
    pack(str(root), tmp_path / "dest", samples_per_shard=7)
    before, after = (DataConfig(root=path).load() for path in (root, tmp_path / "dest"))
    for seed in (1, 2):
        splits = [
            few_shot_split(d.source("train"), d.class_names, 4, seed) for d in (before, after)
        ]
        assert splits[0] == splits[1]


def test_layout_is_clip_benchmarks(tmp_path):
    """Read with the standard library alone."""
    pack(str(write_images(tmp_path / "source", per_class=4)), tmp_path / "dest")
    assert (tmp_path / "dest" / "classnames.txt").read_text() == "blue\ngreen\nred\n"
    templates = tmp_path / "dest" / "zeroshot_classification_templates.txt"
    assert templates.read_text() == "a photo of a {c}.\n"
    assert (tmp_path / "dest" / "test" / "nshards.txt").read_text() == "1\n"
    with tarfile.open(tmp_path / "dest" / "test" / "0.tar") as archive:
        members = archive.getmembers()
        names = [member.name for member in members]
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members}
        stems = [name.partition(".")[0] for name in names]
        for stem in set(stems):
            key = json.loads(archive.extractfile(f"{stem}.json").read())["key"]
            image = archive.extractfile(f"{stem}.png").read()
            assert image == (tmp_path / "source" / key).read_bytes()
            label = int(archive.extractfile(f"{stem}.cls").read())
            assert ("blue", "green", "red")[label] == key.split("/")[0]
    assert facts == {(0, 0, 0, "", "", 0o644)}
    assert stems == [stem for stem in dict.fromkeys(stems) for _ in range(3)]


def test_manifest_has_counts_and_checksums(tmp_path):
    pack(str(write_images(tmp_path / "source")), tmp_path / "dest", samples_per_shard=4)
    manifest = json.loads((tmp_path / "dest" / "manifest.json").read_text())
    for split, content in manifest["splits"].items():
        for i, shard in enumerate(content["shards"]):
            data = (tmp_path / "dest" / split / f"{i}.tar").read_bytes()
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
            assert shard["bytes"] == len(data)
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                assert shard["samples"] == sum(m.name.endswith(".cls") for m in archive)


@pytest.mark.parametrize("write", [write_images, write_shards])
def test_bytes_do_not_depend_on_workers(tmp_path, write):
    root = write(tmp_path / "source")
    for workers in (0, 1, 2):
        pack(str(root), tmp_path / str(workers), samples_per_shard=3, num_workers=workers)
    assert tree(tmp_path / "0") == tree(tmp_path / "1") == tree(tmp_path / "2")


def test_a_folders_classes_are_mixed(tmp_path):
    pack(str(write_images(tmp_path / "source", per_class=40)), tmp_path / "d", samples_per_shard=20)
    for shard in load_dataset(tmp_path / "d").source("train").shards():
        assert {sample.label for sample in shard} == {0, 1, 2}


def test_shards_are_bounded_in_bytes_too(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(6):
            noise = Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8))
            noise.save(tmp_path / "source" / name / f"{i}.png")  # about 480 kB
    result = pack(str(tmp_path / "source"), tmp_path / "dest", shard_mb=1)
    shards = [s for split in result.manifest["splits"].values() for s in split["shards"]]
    assert {shard["samples"] for shard in shards} <= {1, 2}
    assert sum(shard["samples"] for shard in shards) == 12


# Keys and names


@pytest.mark.parametrize("key", ["s0000001", "train/s-1_b", "0"])
def test_safe_keys_are_the_names(key):
    fields = tar_fields(Sample(key, color_image("red", 0), 2))
    assert [name for name, _ in fields] == [f"{key}.png", f"{key}.cls"]
    assert fields[1][1] == b"2"


@pytest.mark.parametrize(
    "key", ["a.jpg", "/abs", "../up", "a//b", "é", "a b", "", "x" * 90, "a\nb"]
)
def test_other_keys_are_kept_in_json(key):
    fields = dict(tar_fields(Sample(key, color_image("red", 0), 2, "photo")))
    (name,) = {name.partition(".")[0] for name in fields}
    assert name.isascii()
    assert name.isalnum()
    assert json.loads(fields[f"{name}.json"]) == {"key": key, "domain": "photo"}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "gif", "tiff", "ppm"])
def test_the_extension_is_told_by_the_bytes(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    (name, content), *_ = tar_fields(Sample("k", buffer.getvalue(), 0))
    assert name == "k." + {"jpeg": "jpg", "tiff": "tif"}.get(kind, kind)
    assert content == buffer.getvalue()


def test_datasets_of_images_without_files(tmp_path):
    images = torchvision.datasets.FakeData(size=6, image_size=(3, 8, 8), num_classes=2)
    dataset = Dataset.from_torchvision({"train": images, "test": images}, class_names=["a", "b"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "load_dataset", lambda *_, **__: dataset)
        pack("given", tmp_path / "dest")
    assert facts(load_dataset(tmp_path / "dest")) == facts(dataset)


# Resizing


def image_of(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(("size", "expected"), [((90, 60), (48, 32)), ((60, 90), (32, 48))])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_resizing_is_of_the_shorter_side(kind, size, expected):
    buffer = io.BytesIO()
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    image.save(buffer, kind, quality=95)
    small = image_of(shrink(Sample("k", buffer.getvalue(), 0), 32).image)
    assert (small.size, small.format.lower(), small.mode) == (expected, kind, "RGB")
    reference = image.resize(expected, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small, int) - np.asarray(reference, int)).mean() < 3


def test_small_images_keep_their_bytes(tmp_path):
    sample = Sample("k", color_image("red", 0), 0)
    assert shrink(sample, 20) is sample
    root = write_images(tmp_path / "source", per_class=3)
    big = Image.new("RGB", (64, 48), "red")
    big.save(root / "red" / "0.png")
    pack(str(root), tmp_path / "dest", resize=32)
    before, after = facts(load_dataset(root)), facts(load_dataset(tmp_path / "dest"))
    for split in before:
        for old, new in zip(before[split], after[split], strict=True):
            assert old[0] == new[0]
            assert (old[1] == new[1]) == (old[0] != "red/0.png")
            assert max(image_of(new[1]).size) <= 43


# Bad input


def test_nothing_is_written_for_bad_input(tmp_path):
    root = write_shards(tmp_path / "source", labels=(0, 1, 9))
    with pytest.raises(VlkrError, match=r"0\.tar, sample 's2_0' has label 9, expected below 3"):
        pack(str(root), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
    with pytest.raises(VlkrError, match=r"more than 3 bad samples; the last: .*has label 9"):
        pack(str(root), tmp_path / "dest", max_bad=3)
    assert not (tmp_path / "dest").exists()


def test_bad_samples_are_left_out_and_told(tmp_path):
    root = write_images(tmp_path / "source", per_class=4)
    (root / "red" / "1.png").write_bytes(b"no image")
    with pytest.raises(VlkrError, match=r"sample 'red/1\.png' is not an image in a known"):
        pack(str(root), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
    result = pack(str(root), tmp_path / "dest", max_bad=1, num_workers=2)
    assert result.bad == ["sample 'red/1.png' is not an image in a known format"]
    assert result.to_json()["bad_samples"] == result.bad
    keys = [s.key for split in load_dataset(tmp_path / "dest").splits.values() for s in split]
    assert len(keys) == 11
    assert "red/1.png" not in keys


def test_a_key_in_two_shards_is_told(tmp_path):
    root = write_shards(tmp_path / "source")
    tar = root / "train" / "1.tar"
    tar.write_bytes((root / "train" / "0.tar").read_bytes())
    with pytest.raises(VlkrError, match="key 's0_0' occurs twice in the split 'train'"):
        pack(str(root), tmp_path / "dest")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard 0 is too small, expected at least 1"),
        ({"shard_mb": 0}, "shard_mb 0 is too small"),
        ({"resize": 3}, "resize 3 is too small, expected at least 8 pixels"),
        ({"num_workers": -1}, "number of workers -1 is negative"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(VlkrError, match=message):
        pack(str(write_images(tmp_path / "source")), tmp_path / "dest", **options)
    assert not (tmp_path / "dest").exists()


def test_what_is_there_stays_unless_forced(tmp_path):
    root = write_images(tmp_path / "source")
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "mine.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(VlkrError, match="exists already; name another folder, or"):
            pack(str(root), dest, force=force)
    assert tree(dest) == {"mine.txt": b"mine"}
    (dest / "mine.txt").unlink()
    pack(str(root), dest, samples_per_shard=4)
    before = tree(dest)
    with pytest.raises(VlkrError, match="exists already"):
        pack(str(root), dest)
    assert tree(dest) == before
    pack(str(root), dest, force=True)
    assert (dest / "train" / "nshards.txt").read_text() == "1\n"
    assert not (dest / "train" / "1.tar").exists()


# Interruptions


def test_finished_shards_are_kept(tmp_path, monkeypatch):
    root = write_images(tmp_path / "source")
    pack(str(root), tmp_path / "whole", samples_per_shard=4)
    written = []

    def failing(sample, size):
        written.append(sample)
        if len(written) == 10:
            raise KeyboardInterrupt
        return sample

    dest = tmp_path / "dest"
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "shrink", failing)
        with pytest.raises(KeyboardInterrupt):
            pack(str(root), dest, samples_per_shard=4)
    assert not (dest / "classnames.txt").exists()
    stamps = {p: p.stat().st_mtime_ns for p in dest.rglob("*.tar")}
    assert len(stamps) == 2
    with pytest.raises(VlkrError, match="an unfinished packing of other images or options; --fo"):
        pack(str(root), dest, samples_per_shard=5)
    with pytest.raises(VlkrError, match="an unfinished packing of other images or options; --fo"):
        pack(str(write_images(tmp_path / "other", 5)), dest, samples_per_shard=4)
    result = pack(str(root), dest, samples_per_shard=4)
    assert result.kept == 2
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert tree(dest) == tree(tmp_path / "whole")


def test_a_damaged_finished_shard_is_written_anew(tmp_path, monkeypatch):
    root = write_images(tmp_path / "source")
    pack(str(root), tmp_path / "whole", samples_per_shard=4)
    dest = tmp_path / "dest"
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(str(root), dest, samples_per_shard=4)
    with (dest / "train" / "1.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"!")
    (dest / "test" / "0.tar").unlink()
    pack(str(root), dest, samples_per_shard=4)
    assert tree(dest) == tree(tmp_path / "whole")


def pack_quietly(root, dest):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pack(str(root), dest, samples_per_shard=2, num_workers=2, resize=16)


def run_for(target, delay):
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(delay)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


def check_kills(tmp_path, kills):
    root = write_images(tmp_path / "source", per_class=30)
    started = time.monotonic()
    assert run_for(partial(pack_quietly, root, tmp_path / "whole"), 300) == 0
    seconds = time.monotonic() - started
    rng, killed, number = random.Random(0), 0, 0
    while killed < kills:
        number += 1
        job = partial(pack_quietly, root, tmp_path / f"broken-{number}")
        while killed < kills and run_for(job, rng.uniform(0, seconds)) != 0:
            killed += 1
        assert run_for(job, 300) in (0, 1)  # 1 where it was finished
        assert tree(tmp_path / f"broken-{number}") == tree(tmp_path / "whole")


def test_interrupted_behind_the_first_shard_it_goes_on(tmp_path, monkeypatch):
    """Before that shard is noted, and by workers the folder alone would not tell whose it is."""
    root = write_images(tmp_path / "source")
    pack(str(root), tmp_path / "whole", samples_per_shard=5)
    dest, write_json = tmp_path / "dest", pack_module.write_json

    def interrupted(path, value):
        if list(dest.rglob("*.tar")):
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(str(root), dest, samples_per_shard=5)
    assert len(list(dest.rglob("*.tar"))) == 1
    pack(str(root), dest, samples_per_shard=5)
    assert tree(dest) == tree(tmp_path / "whole")


def test_killed_packing_goes_on_to_the_same_bytes(tmp_path):
    check_kills(tmp_path, 3)


@pytest.mark.slow
def test_packing_killed_ten_times_goes_on_to_the_same_bytes(tmp_path):
    check_kills(tmp_path, 10)


# Parallel work


def double(value):
    if value == "bad":
        raise VlkrError("this value is bad: really")
    return value * 2


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_parallel_map_is_map(workers):
    assert list(parallel_map(double, list(range(7)), workers)) == [0, 2, 4, 6, 8, 10, 12]
    assert list(parallel_map(double, [], workers)) == []
    with pytest.raises(VlkrError, match=r"^this value is bad: really$"):
        list(parallel_map(double, [1, "bad"], workers))


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("count", range(8))
def test_runs_are_consecutive_on_each_worker(count, workers):
    order = interleave_jobs(list(range(count)), workers)
    assert sorted(order) == list(range(count))
    workers = min(max(workers, 1), max(count, 1))
    for worker in range(workers):
        own = order[worker::workers]
        assert own == list(range(own[0], own[0] + len(own))) if own else True


# The command line, and real images


def test_command(tmp_path, capsys):
    root = write_images(tmp_path / "source")
    assert (
        main(["data", "pack", str(root), str(tmp_path / "dest"), "--samples-per-shard", "9"]) == 0
    )
    out = capsys.readouterr().out
    assert "train: " in out
    assert "images in 2 shards" in out
    arguments = ["data", "pack", str(root), str(tmp_path / "dest"), "--json", "--force"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["test"]["samples"] > 0
    assert main(arguments[:4]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "pacs").is_dir(), reason="no real images here")
def test_commands_of_the_readme_on_real_domains(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PACS").symlink_to(REAL / "pacs")

    def run(*arguments):
        assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    packed = run("data", "pack", "PACS", "pacs-shards", "--num-workers", "2")
    assert sum(split["samples"] for split in packed["splits"].values()) == 1120
    checked = run("data", "verify", "pacs-shards")
    assert (checked["problems"], checked["manifest"]) == ([], True)
    about = run("data", "info", "pacs-shards", "--output", "pacs.png")
    assert about["domains"] == ["art_painting", "cartoon", "photo", "sketch"]
    total = sum(
        number
        for split in about["splits"].values()
        for by_domain in split["counts"].values()
        for number in by_domain.values()
    )
    assert total == 1120
    model = ["--model", f"local-dir:{REAL / 'clip_deit_tiny'}", "--trainer.epochs", "1"]
    small = ["--data.shots", "1", "--data.min-steps-per-epoch", "1", "--adapter.towers", "visual"]
    result = {}
    for name, root in (("folder", "PACS"), ("shards", "pacs-shards")):
        data = ["--data.root", root, "--data.domains", "photo", *small]
        result[name] = run("adapt", *model, *data, "--output", name)
    (folder,), (shards,) = (result[name]["results"] for name in ("folder", "shards"))
    names = {"dataset": "PACS", "templates": "default (1)"}
    assert folder == shards | names
    splits = [(tmp_path / name / "split.jsonl").read_text().splitlines()[1:] for name in result]
    assert splits[0] == splits[1]
