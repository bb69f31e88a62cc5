import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from servers import serving

from vlkr import caching as module
from vlkr.caching import Cache, MissingError, cached_tensors, default_cache
from vlkr.datasets.remote import RemoteRoot
from vlkr.errors import VlkrError


def fetcher(content, calls=None, told=True):
    def fetch(target, on_size):
        if calls is not None:
            calls.append(target)
        if told:
            on_size(len(content))
        target.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    return fetch


def read(cache, address, content=b"", calls=None, told=True):
    with cache.open(address, fetcher(content, calls, told)) as stream:
        return stream.read()


def held(cache):
    """Addresses in the cache, the one used last at the end."""
    sidecars = [path for path in cache.folder.glob("*.json") if path.with_suffix(".data").exists()]
    by_use = sorted(sidecars, key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text())["address"] for path in by_use]


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 1000)


def forget():
    """As a new process, which has not checked any file yet."""
    module._verified.clear()


def test_a_file_is_fetched_once(cache):
    calls = []
    for _ in range(3):
        forget()
        assert read(cache, "a", b"x" * 10, calls) == b"x" * 10
    assert len(calls) == 1
    (sidecar,) = cache.folder.glob("*.json")
    assert json.loads(sidecar.read_text()) == {
        "address": "a",
        "size": 10,
        "sha256": hashlib.sha256(b"x" * 10).hexdigest(),
    }


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data.write_bytes(b"y" * 10),
        lambda data: data.write_bytes(b"x" * 9),
        lambda data: data.unlink(),
        lambda data: data.with_suffix(".json").unlink(),
        lambda data: data.with_suffix(".json").write_text("{"),
        lambda data: data.with_suffix(".json").write_text("{}"),
    ],
)
def test_a_damaged_file_is_fetched_again(cache, harm):
    calls = []
    read(cache, "a", b"x" * 10, calls)
    harm(next(cache.folder.glob("*.data")))
    forget()
    assert read(cache, "a", b"x" * 10, calls) == b"x" * 10
    assert len(calls) == 2


def test_damage_is_seen_by_the_process_that_has_verified_before(cache):
    calls = []
    read(cache, "a", b"x" * 10, calls)
    data = next(cache.folder.glob("*.data"))
    data.write_bytes(b"y" * 10)
    os.utime(data, ns=(0, 0))
    assert read(cache, "a", b"x" * 10, calls) == b"x" * 10
    assert len(calls) == 2


def test_checksums_are_taken_once_per_process(cache, monkeypatch):
    read(cache, "a", b"x" * 10)
    forget()
    checks = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: checks.append(1) or real(*args))
    for _ in range(3):
        read(cache, "a")
    assert len(checks) == 1


@pytest.mark.parametrize("told", [True, False])
def test_what_was_not_used_for_longest_gives_way(cache, told):
    for name in "abc":
        read(cache, name, name.encode() * 300, told=told)
    read(cache, "a")
    read(cache, "d", b"d" * 500, told=told)
    assert held(cache) == ["a", "d"]
    assert sum(path.stat().st_size for path in cache.folder.glob("*.data")) <= cache.max_bytes


def test_a_file_larger_than_the_cache(cache):
    read(cache, "a", b"a" * 900)
    for told in (True, False):
        with pytest.raises(VlkrError, match=r"1,001 bytes does not fit into .*; VLKR_CACHE_GB"):
            read(cache, "b", b"b" * 1001, told=told)
    assert held(cache) == ["a"]
    assert not list(cache.folder.glob("*.part"))


def test_an_open_file_can_be_read_on_when_it_gives_way(cache):
    with cache.open("a", fetcher(b"a" * 900)) as stream:
        read(cache, "b", b"b" * 900)
        assert held(cache) == ["b"]
        assert stream.read() == b"a" * 900


def test_a_file_that_is_being_fetched_does_not_give_way(cache):
    def fetch(target, on_size):
        target.write_bytes(b"a" * 900)
        assert read(cache, "b", b"b" * 500) == b"b" * 500
        assert target.exists()
        return hashlib.sha256(b"a" * 900).hexdigest()

    with cache.open("a", fetch) as stream:
        assert stream.read() == b"a" * 900
    assert held(cache) == ["a"]


def test_a_failure_leaves_nothing(cache):
    def fetch(target, on_size):
        target.write_bytes(b"half")
        raise VlkrError("dropped")

    with pytest.raises(VlkrError, match="dropped"):
        cache.open("a", fetch)
    assert {path.suffix for path in cache.folder.iterdir()} <= {".lock"}
    assert read(cache, "a", b"whole") == b"whole"


@pytest.mark.parametrize(("lasting", "calls"), [(True, 1), (False, 3)])
def test_that_a_file_is_missing_is_believed_for_a_day(cache, monkeypatch, lasting, calls):
    made = []

    def fetch(target, on_size):
        made.append(target)
        raise MissingError("nothing at a", lasting)

    for _ in range(3):
        with pytest.raises(MissingError, match="nothing at a"):
            cache.open("a", fetch)
    assert len(made) == calls
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 25 * 3600)
    assert read(cache, "a", b"new") == b"new"


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VlkrError, match=r"cannot use the cache .*/file/cache: Not a directory"):
        read(Cache(tmp_path / "file" / "cache", 1000), "a")


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path))
    monkeypatch.setenv("VLKR_CACHE_GB", "0.5")
    assert default_cache() == Cache(tmp_path, 500_000_000)
    monkeypatch.delenv("VLKR_CACHE")
    monkeypatch.delenv("VLKR_CACHE_GB")
    assert default_cache() == Cache(Path.home() / ".cache" / "vlkr", 50_000_000_000)
    monkeypatch.setenv("VLKR_CACHE", "~/elsewhere")
    assert default_cache().folder == Path.home() / "elsewhere"
    for size in ("many", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("VLKR_CACHE_GB", size)
        with pytest.raises(VlkrError, match=f"VLKR_CACHE_GB is '{size}', expected a number of"):
            default_cache()


SIZE = 200_000


def read_all(url, names, results):
    for name in names:
        with RemoteRoot(url + "/{path}").open(name) as stream:
            results.put((name, hashlib.sha256(stream.read()).hexdigest()))


@pytest.mark.parametrize("max_gb", ["1", "0.0005"])
def test_several_processes_share_a_cache(tmp_path, monkeypatch, max_gb):
    """Each reads all files, in an order of its own; the small cache holds two of the eight."""
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLKR_CACHE_GB", max_gb)
    (tmp_path / "served").mkdir()
    names = [f"{i}.tar" for i in range(8)]
    expected = {}
    for i, name in enumerate(names):
        content = bytes([i]) * SIZE
        (tmp_path / "served" / name).write_bytes(content)
        expected[name] = hashlib.sha256(content).hexdigest()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with serving(tmp_path / "served") as server:
        orders = [names, names[::-1], names[4:] + names[:4], names]
        processes = [
            context.Process(target=read_all, args=(server.url, order, results)) for order in orders
        ]
        for process in processes:
            process.start()
        found = [results.get(timeout=60) for _ in range(4 * len(names))]
        for process in processes:
            process.join(10)
            assert process.exitcode == 0
        assert sorted(found) == sorted(4 * list(expected.items()))
        if max_gb == "1":
            assert sorted(path for path, _ in server.requests) == names
    total = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.data"))
    assert total <= float(max_gb) * 1e9


def test_a_process_killed_while_fetching_is_no_harm(tmp_path, monkeypatch):
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "0.tar").write_bytes(b"x" * SIZE)
    context = multiprocessing.get_context("fork")
    with serving(tmp_path / "served") as server:
        server.plan["0.tar"] = ["stall"]
        arguments = (server.url, ["0.tar"], context.Queue())
        process = context.Process(target=read_all, args=arguments)
        process.start()
        deadline = time.monotonic() + 20
        while not any(path.stat().st_size for path in (tmp_path / "cache").glob("*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        root = RemoteRoot(server.url + "/{path}")
        with root.open("0.tar") as stream:
            assert stream.read() == b"x" * SIZE
    assert not list((tmp_path / "cache").glob("*.part"))


# Tensors


class Maker:
    """Counts how often something is computed."""

    def __init__(self, size=10):
        self.size = size
        self.times = 0

    def __call__(self):
        self.times += 1
        return {"x": torch.arange(float(self.size))}, {"note": "é"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tensors_are_computed_once(folder):
    make = Maker()
    for _ in range(3):
        forget()
        tensors, texts = cached_tensors("things", {"name": "a", "numbers": [1, 2]}, make)
        torch.testing.assert_close(tensors, {"x": torch.arange(10.0)}, rtol=0, atol=0)
        assert texts == {"note": "é"}
    assert make.times == 1
    assert cached_tensors("nothing", {}, lambda: ({}, {})) == ({}, {})


def test_every_part_of_the_key_counts(folder):
    make = Maker()
    keys = [{"a": 1}, {"a": 2}, {"a": 1, "b": 1}, {"a": [1]}, {"a": "1"}]
    for _ in range(2):
        for key in keys:
            cached_tensors("things", key, make)
        cached_tensors("others", keys[0], make)
    assert make.times == 6


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100])
def test_damaged_tensors_are_computed_again(folder, content):
    make = Maker()
    cached_tensors("things", {}, make)
    next(folder.glob("*.data")).write_bytes(content)
    tensors, _ = cached_tensors("things", {}, make)
    torch.testing.assert_close(tensors["x"], torch.arange(10.0), rtol=0, atol=0)
    cached_tensors("things", {}, make)
    assert make.times == 2


def test_tensors_and_downloads_share_the_space(folder, monkeypatch):
    monkeypatch.setenv("VLKR_CACHE_GB", "0.000005")  # 5,000 bytes
    first, second = Maker(500), Maker(500)  # somewhat more than 2,000 bytes each
    cached_tensors("things", {"i": 1}, first)
    cached_tensors("things", {"i": 2}, second)
    cached_tensors("things", {"i": 1}, first)  # used again: now the newest
    read(default_cache(), "https://host/0.tar", bytes(2000))
    cached_tensors("things", {"i": 1}, first)
    cached_tensors("things", {"i": 2}, second)
    assert (first.times, second.times) == (1, 2)
    assert sum(path.stat().st_size for path in folder.glob("*.data")) <= 5000


def test_a_cache_that_cannot_be_used_is_a_warning(folder, monkeypatch):
    monkeypatch.setenv("VLKR_CACHE_GB", "0.000001")
    with pytest.warns(UserWarning, match="nothing is cached: .* does not fit into .*--no-cache"):
        cached_tensors("things", {}, Maker(500))
    shutil.rmtree(folder)
    folder.write_text("a file")
    make = Maker()
    with pytest.warns(UserWarning, match="nothing is cached: cannot use the cache .*--no-cache"):
        tensors, _ = cached_tensors("things", {}, make)
    torch.testing.assert_close(tensors["x"], torch.arange(10.0), rtol=0, atol=0)
    assert make.times == 1
