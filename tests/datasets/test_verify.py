import io
import json
import tarfile

import pytest
from helpers import write_images, write_shards

from vlkr.cli import main
from vlkr.datasets.inspect import verify
from vlkr.datasets.packing import pack
from vlkr.errors import VlkrError


@pytest.fixture
def packed(tmp_path):
    root = write_images(tmp_path / "source", per_class=8)
    pack(str(root), tmp_path / "dest", samples_per_shard=5)
    return tmp_path / "dest"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_packed_is_good(packed, workers):
    found = verify(str(packed), num_workers=workers)
    assert found.problems == []
    assert found.exit_code == 0
    assert found.has_manifest
    assert sum(found.samples.values()) == 24


def rewrite(tar, change):
    """Writes a tar anew, each file's name and content as ``change`` gives them."""
    with tarfile.open(tar) as archive:
        files = [(m.name, archive.extractfile(m).read()) for m in archive]
    with tarfile.open(tar, "w") as archive:
        for name, content in filter(None, (change(*file) for file in files)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def first_of(tar, extension):
    with tarfile.open(tar) as archive:
        return next(name for name in archive.getnames() if name.endswith(extension))


def test_a_corrupt_image_is_listed_and_the_rest_is_looked_at(packed):
    tar = packed / "train" / "1.tar"
    damaged = first_of(tar, ".png")
    rewrite(tar, lambda name, data: (name, data[:100] if name == damaged else data))
    found = verify(str(packed))
    assert found.exit_code == 1
    assert found.problems[0] == f"{tar} is not the file of the manifest, its checksum differs"
    assert "is a corrupt image" in found.problems[1]
    assert f"{tar}, sample '" in found.problems[1]
    assert found.problems[2] == f"{tar} has 4 good samples, the manifest counts 5"
    assert len(found.problems) == 3
    assert sum(found.samples.values()) == 23


def test_a_label_out_of_range(packed):
    tar = packed / "test" / "0.tar"
    wrong = first_of(tar, ".cls")
    rewrite(tar, lambda name, data: (name, b"3" if name == wrong else data))
    problems = verify(str(packed)).problems
    assert any("has label 3, expected below 3" in problem for problem in problems)


def test_a_sample_that_is_missing(packed):
    tar = packed / "train" / "0.tar"
    stem = first_of(tar, ".cls").removesuffix(".cls")
    rewrite(tar, lambda name, data: None if name.startswith(stem) else (name, data))
    assert verify(str(packed)).problems[1:] == [f"{tar} has 4 good samples, the manifest counts 5"]


def test_a_truncated_shard(packed):
    tar = packed / "train" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    problems = verify(str(packed)).problems
    assert any(problem.startswith(f"cannot read shard {tar}") for problem in problems)


def test_a_missing_shard(packed):
    (packed / "train" / "1.tar").unlink()
    found = verify(str(packed))
    assert found.exit_code == 1
    assert "train/1.tar is missing" in found.problems[0]


def test_fewer_shards_than_the_manifest(packed):
    count = int((packed / "train" / "nshards.txt").read_text())
    (packed / "train" / "nshards.txt").write_text(f"{count - 1}\n")
    found = verify(str(packed))
    assert found.problems == [f"split 'train' has {count - 1} shards, the manifest {count}"]


def test_a_split_that_is_gone(packed):
    (packed / "test").rename(packed / "elsewhere")
    found = verify(str(packed))
    assert found.exit_code == 1
    assert any("test" in problem for problem in found.problems)


def test_a_key_in_two_shards(tmp_path):
    root = write_shards(tmp_path / "d", per_class=2)
    (root / "train" / "1.tar").write_bytes((root / "train" / "0.tar").read_bytes())
    found = verify(str(root))
    assert not found.has_manifest
    assert "key 's0_0' occurs twice in the split 'train'" in found.problems


def test_folders_are_verified_too(tmp_path):
    root = write_images(tmp_path / "d", per_class=4)
    (root / "red" / "2.png").write_bytes(b"no image")
    found = verify(str(root))
    assert found.problems == ["sample 'red/2.png' is not an image in a known format"]
    assert sum(found.samples.values()) == 11


def test_a_manifest_that_is_none_is_told(packed):
    (packed / "manifest.json").write_text("{}")
    with pytest.raises(VlkrError, match=r"manifest\.json is n"):
        verify(str(packed))


def test_command(packed, capsys):
    assert main(["data", "verify", str(packed)]) == 0
    assert "no problem; good images: train" in capsys.readouterr().out
    tar = packed / "train" / "0.tar"
    damaged = first_of(tar, ".png")
    rewrite(tar, lambda name, data: (name, b"" if name == damaged else data))
    assert main(["data", "verify", str(packed)]) == 1
    out = capsys.readouterr().out
    assert out.count("bad: ") == 3
    assert "3 problems" in out
    assert main(["data", "verify", str(packed), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 3
    assert main(["data", "verify", str(packed / "nowhere")]) == 2
