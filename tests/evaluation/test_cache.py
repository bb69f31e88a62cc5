import os

import pytest
import torch

from vlkr.evaluation import cache
from vlkr.evaluation.cache import cache_folder, cached


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Counts how often something is made."""

    def __init__(self, size=10):
        self.size = size
        self.times = 0

    def __call__(self):
        self.times += 1
        return {"x": torch.arange(float(self.size))}, {"note": "é"}


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_made_once(folder):
    make = Maker()
    for _ in range(3):
        tensors, texts = cached("things", {"name": "a", "numbers": [1, 2]}, make)
        assert torch.equal(tensors["x"], torch.arange(10.0))
        assert texts == {"note": "é"}
    assert make.times == 1
    assert [path.parent for path in files(folder)] == [folder / "things"]


def test_every_part_of_the_key_counts(folder):
    make = Maker()
    keys = [{"a": 1}, {"a": 2}, {"a": 1, "b": 1}, {"a": [1]}, {"a": "1"}]
    for key in keys:
        cached("things", key, make)
    cached("others", keys[0], make)
    assert make.times == len(files(folder)) == 6


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100])
def test_damaged_file_is_made_anew(folder, content):
    make = Maker()
    cached("things", {}, make)
    files(folder)[0].write_bytes(content)
    assert torch.equal(cached("things", {}, make)[0]["x"], torch.arange(10.0))
    cached("things", {}, make)
    assert make.times == 2


def test_oldest_goes_first(folder, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 9000)
    for i in range(3):
        cached("things", {"i": i}, Maker(500))  # somewhat more than 2,000 bytes
        os.utime(max(files(folder), key=lambda p: p.stat().st_mtime), (100 + i, 100 + i))
    again = Maker(500)
    cached("things", {"i": 0}, again)  # used again: now the newest
    cached("things", {"i": 3}, again)
    cached("things", {"i": 4}, again)
    assert again.times == 2
    assert sum(path.stat().st_size for path in files(folder)) <= 9000
    kept = Maker(500)
    for i in (0, 3, 4):
        cached("things", {"i": i}, kept)
    assert kept.times == 0
    cached("things", {"i": 1}, kept)
    assert kept.times == 1


def test_folder_that_cannot_be_written_is_a_warning(folder):
    folder.write_text("a file")
    with pytest.warns(UserWarning, match="nothing is cached: cannot write .*--no-cache"):
        tensors, _ = cached("things", {}, Maker())
    assert torch.equal(tensors["x"], torch.arange(10.0))


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("VLKR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vlkr"
