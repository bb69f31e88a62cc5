import io
import tarfile

import pytest
from helpers import COLORS, color_image, write_images, write_shards, write_tar

from vlkr.datasets import FolderSource, ShardSource
from vlkr.datasets.sources import image_files, unit_hash
from vlkr.errors import VlkrError

NAMES = tuple(COLORS)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_give_every_sample_once_and_in_the_same_order(tmp_path, shards):
    source = ShardSource(write_shards(tmp_path / "d", shards=shards) / "train", 3)
    samples = list(source)
    assert list(source) == samples
    expected = {
        (f"s{c}_{i}", color_image(name, 100 * c + i), c)
        for c, name in enumerate(NAMES)
        for i in range(8)
    }
    assert {(s.key, s.image, s.label) for s in samples} == expected
    assert len(samples) == len(expected)


def test_shards_without_a_count_are_found_by_name(tmp_path):
    folder = write_shards(tmp_path / "d") / "train"
    counted = list(ShardSource(folder, 3))
    (folder / "nshards.txt").unlink()
    assert list(ShardSource(folder, 3)) == counted


def test_reading_only_the_first_samples_closes_the_shard(tmp_path):
    source = ShardSource(write_shards(tmp_path / "d") / "train", 3)
    samples = iter(source)
    next(samples)
    del samples  # an open file would be a ResourceWarning, which is an error here


def damage(shard, size):
    shard.write_bytes(shard.read_bytes()[:size])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: damage(d / "1.tar", 700), r"cannot read shard .*1\.tar: unexpected end of data"),
        (lambda d: damage(d / "1.tar", 512), r"cannot read shard .*1\.tar: unexpected end of data"),
        (lambda d: damage(d / "1.tar", 0), r"cannot read shard .*1\.tar: empty file"),
        (lambda d: (d / "1.tar").write_bytes(b"no tar " * 999), r"read shard .*1\.tar: invalid"),
        (lambda d: (d / "1.tar").unlink(), r"shard .*1\.tar is missing, .*nshards\.txt counts 2"),
        (lambda d: (d / "nshards.txt").write_text("two"), "holds 'two', expected the number"),
        (lambda d: (d / "nshards.txt").write_text("0"), "holds '0', expected the number"),
        (lambda d: write_tar(d / "0.tar", [("k", b"", 3)]), "'k': label 3, expected below 3"),
        (lambda d: write_tar(d / "0.tar", [("k", b"", -1)]), "expected .cls with an integer"),
        (lambda d: write_tar(d / "0.tar", [("k", b"", 1.5)]), "expected .cls with an integer"),
        (lambda d: write_tar(d / "0.tar", [("k.x", b"", 1)]), "'k': no image, expected one of"),
    ],
)
def test_damaged_shards_are_told_by_name(tmp_path, harm, message):
    folder = write_shards(tmp_path / "d") / "train"
    harm(folder)
    with pytest.raises(VlkrError, match=message):
        list(ShardSource(folder, 3))


def test_shard_that_lost_its_last_label(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        entry = tarfile.TarInfo("k.png")
        archive.addfile(entry, io.BytesIO())
    with pytest.raises(VlkrError, match=r"'k': label None, expected \.cls"):
        list(ShardSource(folder, 3))


def test_no_shards(tmp_path):
    with pytest.raises(VlkrError, match="no shards in"):
        list(ShardSource(tmp_path, 3))


def test_nothing_in_a_shard_is_unpickled(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        contents = {
            "k.pkl": b"cos\nabort\n(tR.",  # ends the process when it is unpickled
            "k.pyd": b"cos\nabort\n(tR.",
            "k.png": b"image",
            "k.cls": b"1",
        }
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    (sample,) = ShardSource(folder, 3)
    assert (sample.key, sample.image, sample.label) == ("k", b"image", 1)


def test_folder_gives_every_image_once(tmp_path):
    root = write_images(tmp_path / "d", per_class=4)
    (root / "red" / "deeper").mkdir()
    (root / "red" / "deeper" / "UPPER.PNG").write_bytes(b"x")
    (root / "red" / "notes.txt").write_text("no image")
    (root / "red" / "._0.png").write_text("a resource fork, as macOS leaves them")
    samples = list(FolderSource(root, NAMES))
    keys = {f"{name}/{i}.png" for name in NAMES for i in range(4)} | {"red/deeper/UPPER.PNG"}
    assert [s.key for s in samples] == [
        *sorted(k for k in keys if k.startswith("red")),
        *(f"green/{i}.png" for i in range(4)),
        *(f"blue/{i}.png" for i in range(4)),
    ]
    assert all(s.image == (root / s.key).read_bytes() for s in samples)
    assert all(NAMES[s.label] == s.key.split("/")[0] for s in samples)


def test_held_out_part_is_the_rest_and_follows_the_names_alone(tmp_path):
    root = write_images(tmp_path / "d", per_class=40)
    train = {s.key for s in FolderSource(root, NAMES, held_out=False, fraction=0.25)}
    test = {s.key for s in FolderSource(root, NAMES, held_out=True, fraction=0.25)}
    assert not train & test
    assert len(train | test) == 120
    assert 15 < len(test) < 45  # 30 expected, standard deviation 4.7
    (root / "red" / "39.png").unlink()
    (root / "red" / "0.png").write_bytes(b"another image")
    fewer = {s.key for s in FolderSource(root, NAMES, held_out=True, fraction=0.25)}
    assert fewer == test - {"red/39.png"}


def test_empty_class_is_told(tmp_path):
    root = write_images(tmp_path / "d", per_class=1)
    (root / "blue" / "0.png").unlink()
    with pytest.raises(VlkrError, match=r"class 'blue' is empty: no image in .*blue"):
        list(FolderSource(root, NAMES))
    assert image_files(root / "blue") == []


def test_image_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    root = write_images(tmp_path / "d", per_class=1)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(root), "read_bytes", refuse)
    with pytest.raises(VlkrError, match=r"cannot read .*red/0\.png: Permission denied"):
        list(FolderSource(root, NAMES))


def test_unit_hash_is_uniform_and_seeded():
    values = [unit_hash(f"key{i}") for i in range(2000)]
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert abs(sum(values) / 2000 - 0.5) < 0.03  # standard error 0.0065
    assert len({unit_hash("key", seed) for seed in (None, 0, 1, 2)}) == 4
