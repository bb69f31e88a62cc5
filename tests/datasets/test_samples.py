import io
import os
import pickle

import numpy as np
import pytest
from helpers import COLORS, color_image, write_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import FakeData, ImageFolder

from vlkr.datasets import BadSample, Dataset, FileSource, Sample, View, load_dataset
from vlkr.datasets import samples as samples_module
from vlkr.datasets.images import decode_image
from vlkr.datasets.samples import (
    ImageFile,
    Joined,
    TorchvisionSource,
    chunks,
    good_samples,
    is_safe_path,
    shuffled_by_hash,
    unit_hash,
)
from vlkr.errors import VlkrError


def files(root, per_class=4):
    write_images(root, per_class)
    names = [f"{name}/{i}.png" for name in COLORS for i in range(per_class)]
    return FileSource(
        root,
        [
            ImageFile(n, list(COLORS).index(n.split("/")[0]), "ab"[i % 2])
            for i, n in enumerate(names)
        ],
    )


def collect(source):
    bad = []
    return list(good_samples(source, bad.append)), bad


def test_files_give_their_bytes_in_order(tmp_path):
    source = files(tmp_path / "d")
    samples = list(source)
    assert list(source) == samples
    assert [s.key for s in samples] == [f"{name}/{i}.png" for name in COLORS for i in range(4)]
    assert all(s.image == (tmp_path / "d" / s.key).read_bytes() for s in samples)
    assert [s.label for s in samples] == [0] * 4 + [1] * 4 + [2] * 4
    assert [s.domain for s in samples] == ["a", "b"] * 6


def test_a_file_that_cannot_be_used_is_told_and_the_next_ones_follow(tmp_path, monkeypatch):
    source = files(tmp_path / "d")
    root = tmp_path / "d"
    (root / "red" / "1.png").unlink()
    (root / "red" / "2.png").unlink()
    os.mkfifo(root / "red" / "2.png")
    (root / "green" / "0.png").write_bytes(bytes(5000))
    monkeypatch.setattr(samples_module, "MAX_BYTES", 4000)
    samples, bad = collect(source)
    assert [error.key for error in bad] == ["red/1.png", "red/2.png", "green/0.png"]
    assert str(bad[0]).startswith("sample 'red/1.png' cannot be read from ")
    assert str(bad[0]).endswith("red/1.png: No such file or directory")
    assert [str(error) for error in bad[1:]] == [
        "sample 'red/2.png' is not a file",
        "sample 'green/0.png' has 5,000 bytes, more than the 4,000 allowed",
    ]
    assert len(samples) == 9


@given(st.integers(0, 1000))
def test_chunks_are_even_and_whole(length):
    parts = chunks(range(length))
    assert [i for part in parts for i in part] == list(range(length))
    assert len(parts) == min(length, 256)
    assert length == 0 or max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_of_every_source_add_up(tmp_path):
    source = files(tmp_path / "d")
    images = FakeData(size=5, image_size=(3, 4, 4))
    for whole in (
        source,
        View(source, domains=["a"]),
        Joined([source, source]),
        TorchvisionSource(images, 10),
    ):
        parts = whole.shards()
        assert [sample for part in parts for sample in part] == list(whole)
        assert list(pickle.loads(pickle.dumps(parts[-1]))) == list(parts[-1])


def test_domains_are_chosen(tmp_path):
    source = files(tmp_path / "d")
    expected = [s for s in source if s.domain == "b"]
    assert len(expected) == 6
    assert list(View(source, domains=["b"])) == expected
    (tmp_path / "d" / "red" / "1.png").unlink()
    samples, bad = collect(View(source, domains=["b"]))
    assert (samples, [error.key for error in bad]) == (expected[1:], ["red/1.png"])


def test_held_out_part_is_the_rest_and_follows_the_names_alone(tmp_path):
    def split():
        dataset = load_dataset(tmp_path / "d", test_fraction=0.25)
        return [{s.key for s in dataset.source(name)} for name in ("train", "test")]

    write_images(tmp_path / "d", per_class=40)
    train, test = split()
    assert not train & test
    assert len(train | test) == 120
    assert 15 < len(test) < 45  # 30 expected, standard deviation 4.7
    gone = max(test)
    (tmp_path / "d" / gone).unlink()
    assert split() == [train, test - {gone}]


def test_unit_hash_is_uniform_and_seeded():
    values = [unit_hash(f"key{i}") for i in range(2000)]
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert abs(sum(values) / 2000 - 0.5) < 0.03  # standard error 0.0065
    assert len({unit_hash("key", seed) for seed in (None, 0, 1, 2)}) == 4


@pytest.mark.parametrize("path", ["a", "a/b.png", "./a", "a..b/c", "..a", "a/b:c"])
def test_safe_paths(path):
    assert is_safe_path(path)


@pytest.mark.parametrize("path", ["", "/a", "..", "../a", "a/../b", "a/..", "a\\..\\b", "a\0b"])
def test_paths_that_lead_out(path):
    assert not is_safe_path(path)


def test_error_names_what_it_knows():
    texts = {
        "is bad": BadSample("is bad"),
        "sample 'k' is bad": BadSample("is bad", "k"),
        "s.tar, sample 'k' is bad": BadSample("is bad", "k", "s.tar"),
        r"s\x1b.tar, sample 'k\n' is bad": Sample("k\n", b"", 0, shard="s\x1b.tar").bad("is bad"),
    }
    for text, bad in texts.items():
        assert str(bad) == text


def test_torchvision_folder_gives_the_files_own_bytes(tmp_path):
    root = write_images(tmp_path / "d", per_class=3)
    dataset = Dataset.from_torchvision({"train": ImageFolder(root)}, name="colors")
    assert (dataset.name, dataset.class_names) == ("colors", tuple(sorted(COLORS)))
    samples = list(dataset.source("train"))
    expected = [path.read_bytes() for path in sorted(root.glob("*/*.png"))]
    assert [s.image for s in samples] == expected
    assert [s.label for s in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [s.key for s in samples] == [f"{i:07d}" for i in range(9)]


class Pictures:
    """A dataset object like torchvision's, of images in memory."""

    classes = ("cat", "dog")

    def __init__(self, images, labels, transform=None):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "I;16", "CMYK"])
def test_images_in_memory_are_encoded_without_loss(mode):
    values = np.random.default_rng(0).integers(0, 256, (6, 5, 4)).astype(np.uint8)
    image = Image.fromarray(values[..., 0].astype(np.uint16) * 257) if mode == "I;16" else None
    image = image or Image.fromarray(values[..., :3]).convert(mode)
    dataset = Dataset.from_torchvision({"test": Pictures([image], [1])})
    (sample,) = dataset.source("test")
    assert (sample.key, sample.label, dataset.name) == ("0000000", 1, "Pictures")
    again = Image.open(io.BytesIO(sample.image))
    np.testing.assert_array_equal(np.asarray(again.convert(image.mode)), np.asarray(image))
    assert decode_image(sample).size == (5, 6)


def test_labels_out_of_range_are_told():
    image = Image.new("RGB", (2, 2))
    source = TorchvisionSource(Pictures([image] * 4, [0, 2, -1, 1]), 2)
    samples, bad = collect(source)
    assert [s.label for s in samples] == [0, 1]
    assert [str(error) for error in bad] == [
        "sample '0000001' has label 2, expected below 2",
        "sample '0000002' has label -1, expected below 2",
    ]


def test_target_transform_counts(tmp_path):
    root = write_images(tmp_path / "d", per_class=1)
    images = ImageFolder(root, target_transform=lambda label: 2 - label)
    assert [s.label for s in TorchvisionSource(images, 3)] == [2, 1, 0]


def test_objects_that_do_not_fit(tmp_path):
    image = Image.new("RGB", (2, 2))
    with pytest.raises(VlkrError, match="dataset Pictures has a transform; leave it out"):
        TorchvisionSource(Pictures([image], [0], transform=lambda x: x), 2)
    with pytest.raises(VlkrError, match="item 0 of dataset Pictures is a bytes, expected a PIL"):
        list(TorchvisionSource(Pictures([b"x"], [0]), 2))
    with pytest.raises(VlkrError, match=r"splits are \['all'\], expected some of train, val, test"):
        Dataset.from_torchvision({"all": Pictures([], [])})
    other = Pictures([image], [0])
    other.classes = ("cat", "cow")
    with pytest.raises(VlkrError, match="do not tell the same classes; give class_names"):
        Dataset.from_torchvision({"train": Pictures([image], [0]), "test": other})
    with pytest.raises(VlkrError, match="do not tell the same classes; give class_names"):
        Dataset.from_torchvision({"train": FakeData(size=1)})


def test_samples_compare_without_their_shard():
    image = color_image("red", 0)
    assert Sample("k", image, 1, shard="a") == Sample("k", image, 1, shard="b")


def test_order_by_hash_mixes_classes_and_follows_the_keys_alone(tmp_path):
    source = files(tmp_path / "d", per_class=20)
    keys = [s.key for s in shuffled_by_hash(source, 3)]
    assert keys == sorted((f.path for f in source.files), key=lambda key: unit_hash(key, 3))
    backwards = View(FileSource(source.root, source.files[::-1]), times=dict.fromkeys(keys[:9], 2))
    assert [s.key for s in shuffled_by_hash(backwards, 3)] == [k for k in keys[:9] for _ in "ab"]
    assert len({key.split("/")[0] for key in keys[:9]}) > 1
