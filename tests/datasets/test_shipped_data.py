"""The shipped shards, cards and tiny CLIP: counts, contents, sizes, and that they can be remade."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
TINY_CLIP = ROOT / "vlkr" / "models" / "tiny_clip"
FIELDS = {"name", "title", "class_names", "templates", "shards", "splits", "source", "licence"}
CARDS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in DATA.glob("digits*.yaml")
}
SHIFTS = CARDS["digits"]["shifts"]
SPLITS = [(name, split) for name, card in CARDS.items() for split in card["splits"]]


def read_shard(path):
    """Samples of one shard: key -> {"png": bytes, "cls": bytes}."""
    samples = {}
    with tarfile.open(path) as archive:
        for entry in archive:
            key, extension = entry.name.split(".")
            assert extension not in samples.setdefault(key, {})
            samples[key][extension] = archive.extractfile(entry).read()
    return samples


def read_split(name, split):
    folder = DATA / CARDS[name]["shards"] / split
    num_shards = int((folder / "nshards.txt").read_text(encoding="utf-8"))
    assert {path.name for path in folder.glob("*.tar")} == {f"{i}.tar" for i in range(num_shards)}
    shards = [read_shard(folder / f"{shard}.tar") for shard in range(num_shards)]
    samples = {key: sample for shard in shards for key, sample in shard.items()}
    assert len(samples) == sum(len(shard) for shard in shards)
    return samples


def decode(sample):
    return np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))


def test_cards_name_each_other():
    assert set(CARDS) == {"digits", *SHIFTS}
    for name, card in CARDS.items():
        assert card["name"] == name
        extra = {"shifts"} if name == "digits" else {"shift_of"}
        assert set(card) == FIELDS | extra
        assert card["class_names"] == CARDS["digits"]["class_names"]
        assert all(template.count("{c}") == 1 for template in card["templates"])
    assert all(CARDS[name]["shift_of"] == "digits" for name in SHIFTS)


@pytest.mark.parametrize("name", CARDS)
def test_lists_beside_the_shards_equal_the_card(name):
    folder = DATA / CARDS[name]["shards"]
    names = (folder / "classnames.txt").read_text(encoding="utf-8").splitlines()
    templates = folder / "zeroshot_classification_templates.txt"
    assert names == CARDS[name]["class_names"]
    assert templates.read_text(encoding="utf-8").splitlines() == CARDS[name]["templates"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(CARDS[name]["splits"])


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_samples_are_whole_and_as_many_as_the_card_says(name, split):
    samples = read_split(name, split)
    assert len(samples) == CARDS[name]["splits"][split]
    for key, sample in samples.items():
        assert len(key) == 8
        assert key[0] == "s"
        assert key[1:].isdecimal()
        assert set(sample) == {"png", "cls"}
        assert 0 <= int(sample["cls"].decode("ascii")) <= 9
        assert len(sample["png"]) <= 512
        assert max(decode(sample).shape) <= 32


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_are_balanced(name):
    labels = Counter(int(sample["cls"]) for sample in read_split(name, "test").values())
    assert labels == dict.fromkeys(range(10), 16)


@pytest.mark.parametrize("name", [name for name in SHIFTS if name != "digits-fonts"])
def test_shifts_alter_digits_test_images_and_keep_key_and_label(name):
    originals = read_split("digits", "test")
    for key, sample in read_split(name, "test").items():
        assert sample["cls"] == originals[key]["cls"]
        assert sample["png"] != originals[key]["png"]


def test_inverted_is_the_negative():
    originals = read_split("digits", "test")
    for key, sample in read_split("digits-inverted", "test").items():
        np.testing.assert_array_equal(decode(sample), 255 - decode(originals[key]))


def test_color_orders_pixels_as_the_ink_does():
    originals = read_split("digits", "test")
    for key, sample in read_split("digits-color", "test").items():
        ink = decode(originals[key])[..., 0].astype(float).ravel()
        colours = decode(sample).reshape(64, 3).astype(float)
        background, painted = colours[ink.argmin()], colours[ink.argmax()]
        assert np.linalg.norm(painted - background) > 60
        coverage = (ink - ink.min()) / (ink.max() - ink.min())
        expected = background + coverage[:, None] * (painted - background)
        np.testing.assert_allclose(colours, expected, atol=2)


def test_digits_are_scikit_learns_own_split_by_position():
    source = load_digits()
    train, test = read_split("digits", "train"), read_split("digits", "test")
    assert list(train | test) == [f"s{index:07d}" for index in range(1797)]
    assert len(train | test) == len(train) + len(test)
    for index, sample in enumerate((train | test).values()):
        pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert pixels.shape == (8, 8)
        np.testing.assert_allclose(pixels, source.images[index] * 255 / 16, atol=0.5)
        assert int(sample["cls"]) == source.target[index]


def test_no_test_image_is_a_training_image():
    train = {decode(sample).tobytes() for sample in read_split("digits", "train").values()}
    assert not train & {
        decode(sample).tobytes() for sample in read_split("digits", "test").values()
    }


def test_archives_are_ustar_without_times_or_owners():
    for path in DATA.rglob("*.tar"):
        assert path.read_bytes()[257:265] == b"ustar\x0000"
        with tarfile.open(path) as archive:
            for entry in archive:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname) == (0, 0, 0, "")


def test_make_digits_writes_the_same_bytes(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "make_digits"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    shipped = {
        path.relative_to(DATA)
        for name in CARDS
        for path in (DATA / name).rglob("*")
        if path.is_file()
    }
    assert written == shipped
    # FreeType's version, bundled with Pillow, decides the gray values of rendered glyphs.
    rendered = Path("digits-fonts", "test", "0.tar")
    for path in written - {rendered}:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), path
    again, before = read_shard(tmp_path / rendered), read_shard(DATA / rendered)
    assert list(again) == list(before)
    for key, sample in again.items():
        assert sample["cls"] == before[key]["cls"]
        difference = decode(sample).astype(int) - decode(before[key])
        assert np.abs(difference).mean() < 16


def test_sizes():
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert size < 6_000_000
    assert (TINY_CLIP / "open_clip_model.safetensors").stat().st_size < 8_000_000


def test_tiny_clip_is_fp16_of_the_declared_architecture():
    config = json.loads((TINY_CLIP / "open_clip_config.json").read_text(encoding="utf-8"))
    text, vision = config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
    with safe_open(TINY_CLIP / "open_clip_model.safetensors", framework="np") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        kinds = {weights.get_slice(name).get_dtype() for name in shapes}
        embedding = weights.get_tensor("token_embedding.weight")
    assert kinds == {"F16"}
    assert embedding.shape == (text["vocab_size"], text["width"])
    assert shapes["text_projection"] == [text["width"], config["model_cfg"]["embed_dim"]]
    assert shapes["visual.proj"] == [vision["width"], config["model_cfg"]["embed_dim"]]
    assert shapes["visual.conv1.weight"] == [vision["width"], 3, 8, 8]
    used = np.flatnonzero(np.abs(embedding.astype(np.float32)).max(1))
    assert 50 < len(used) < 300


def test_tiny_clip_tells_rendered_digits_apart():
    name = f"local-dir:{TINY_CLIP}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    card = CARDS["digits-fonts"]
    prompts = [card["templates"][0].format(c=class_name) for class_name in card["class_names"]]
    samples = read_split("digits-fonts", "test").values()
    images = [preprocess(Image.open(io.BytesIO(sample["png"]))) for sample in samples]
    labels = torch.tensor([int(sample["cls"]) for sample in samples])
    with torch.no_grad():
        text = model.eval().encode_text(open_clip.get_tokenizer(name)(prompts), normalize=True)
        image = model.encode_image(torch.stack(images), normalize=True)
    assert ((image @ text.T).argmax(1) == labels).float().mean() > 0.8
