import json

import pytest
from helpers import write_shards
from servers import serving

from vlkr.datasets import load_dataset, remote
from vlkr.datasets.remote import MissingError, Retry
from vlkr.datasets.roots import LocalRoot, open_root
from vlkr.errors import VlkrError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY", Retry(attempts=2, backoff=0.001, timeout=2))
    monkeypatch.setenv("HF_TOKEN", "secret")


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("https://host/a/b", "https://host/a/b/test/0.tar"),
        ("https://host/a/b/", "https://host/a/b/test/0.tar"),
        (
            "hf://datasets/org/name",
            "https://huggingface.co/datasets/org/name/resolve/main/test/0.tar",
        ),
        (
            "hf://datasets/org/name@v1.0/sub/folder/",
            "https://huggingface.co/datasets/org/name/resolve/v1.0/sub/folder/test/0.tar",
        ),
        (
            "hf://datasets/org/name@refs%2Fpr%2F1",
            "https://huggingface.co/datasets/org/name/resolve/refs%2Fpr%2F1/test/0.tar",
        ),
        (
            "wds/imagenet-r",
            "https://huggingface.co/datasets/clip-benchmark/wds_imagenet-r/resolve/main/test/0.tar",
        ),
        (
            "wds/vtab/eurosat",
            "https://huggingface.co/datasets/clip-benchmark/wds_vtab-eurosat/resolve/main/"
            "test/0.tar",
        ),
        (
            "https://huggingface.co/datasets/clip-benchmark/wds_imagenet_sketch/tree/main",
            "https://huggingface.co/datasets/clip-benchmark/wds_imagenet_sketch/resolve/main/"
            "test/0.tar",
        ),
    ],
)
def test_addresses(monkeypatch, reference, url):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert open_root(reference).where("test/0.tar") == url


def test_another_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    url = "https://mirror.example/datasets/clip-benchmark/wds_cars/resolve/main/x"
    assert open_root("wds/cars").where("x") == url


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("s3://bucket/a", "cannot read s3://bucket/a: s3:// is not known, expected https://, hf"),
        ("file:///etc", "file:// is not known"),
        ("hf://org/name", r"'hf://org/name' is no hf://datasets/ORG/NAME"),
        ("hf://datasets/name", "is no hf://datasets/ORG/NAME"),
        ("pipe:cat /data/{path}", "would run a command; --allow-commands"),
        ("pipe:true", "would run a command; --allow-commands"),
    ],
)
def test_what_is_not_read(reference, message):
    with pytest.raises(VlkrError, match=message):
        open_root(reference)
    with pytest.raises(VlkrError, match=message):
        load_dataset(reference)


def test_local_files(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    root = LocalRoot(tmp_path)
    with root.open("a") as stream:
        assert stream.read() == b"x"
    with pytest.raises(MissingError, match=r"no file .*/b"):
        root.open("b")
    (tmp_path / "c").mkdir()
    with pytest.raises(VlkrError, match=r"cannot read .*/c: Is a directory"):
        root.open("c")


def parts(dataset):
    return {split: list(dataset.source(split)) for split in dataset.splits}


def test_shards_from_a_server(tmp_path):
    local = load_dataset(write_shards(tmp_path / "served" / "colors"))
    with serving(tmp_path / "served") as server:
        dataset = load_dataset(f"{server.url}/colors")
        assert (dataset.name, dataset.class_names) == ("colors", local.class_names)
        first = parts(dataset)
        assert first == parts(local)
        shard = next(iter(dataset.source("train"))).shard
        assert shard == f"{server.url}/colors/train/0.tar"
        asked = len(server.requests)
        assert "secret" not in str(server.headers)
    # Everything that was asked for is in the cache; the server is gone.
    assert parts(load_dataset(f"{server.url}/colors")) == first
    assert len(server.requests) == asked


def test_shards_from_the_hub_by_clip_benchmarks_name(tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    folder = hub / "datasets" / "clip-benchmark" / "wds_vtab-colors" / "resolve" / "main"
    folder.parent.mkdir(parents=True)
    write_shards(folder, splits=("test",))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    with serving(hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        dataset = load_dataset("wds/vtab/colors")
        assert (dataset.name, dataset.templates) == ("wds/vtab/colors", ("a {c}", "the {c}"))
        assert list(dataset.splits) == ["test"]
        assert parts(dataset) == parts(load_dataset(folder))
        assert {headers.get("Authorization") for headers in server.headers} == {"Bearer secret"}


def test_a_server_without_a_layout(tmp_path):
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as server:
        with pytest.raises(VlkrError, match=r"no class names in http://.*/x/classnames\.txt"):
            load_dataset(f"{server.url}/x")
        server.plan["y/classnames.txt"] = [500] * 9
        with pytest.raises(VlkrError, match=r"cannot read http://.*/y/classnames\.txt, after 2 at"):
            load_dataset(f"{server.url}/y")


def test_a_missing_shard_is_an_error_and_is_asked_for_again(tmp_path):
    folder = write_shards(tmp_path / "served" / "d", shards=3)
    (folder / "train" / "1.tar").rename(tmp_path / "1.tar")
    with serving(tmp_path / "served") as server:
        dataset = load_dataset(f"{server.url}/d")
        with pytest.raises(VlkrError, match=r"nothing at http://.*/d/train/1\.tar: .* 404"):
            list(dataset.source("train"))
        (tmp_path / "1.tar").rename(folder / "train" / "1.tar")
        assert len(list(dataset.source("train"))) == 24


def test_a_text_that_is_too_long(tmp_path):
    folder = write_shards(tmp_path / "d")
    (folder / "classnames.txt").write_text("red\n" * 2**21)
    with pytest.raises(VlkrError, match=r"classnames\.txt has more than the 4,194,304 bytes all"):
        load_dataset(folder)


def test_commands_run_when_they_are_allowed(tmp_path):
    folder = write_shards(tmp_path / "my colors")
    log = tmp_path / "log"
    command = f"pipe:echo {{path}} >> '{log}'; cat '{folder}'/{{path}} | cat"
    with pytest.raises(VlkrError, match="would run a command"):
        load_dataset(command)
    assert not log.exists()
    dataset = load_dataset(f"pipe:cat '{folder}'/{{path}}", allow_commands=True)
    assert parts(dataset) == parts(load_dataset(folder))
    assert parts(dataset) == parts(load_dataset(folder))
    with pytest.raises(VlkrError, match=r"lacks {path}, the place of a file's path"):
        load_dataset("pipe:true", allow_commands=True)
    with pytest.raises(VlkrError, match=r"no class names in pipe:false x/classnames\.txt"):
        load_dataset("pipe:false x/{path}", allow_commands=True)


def test_a_command_that_fails_in_the_midst_is_an_error(tmp_path):
    folder = write_shards(tmp_path / "d")
    command = f"pipe:cat '{folder}'/{{path}} && test {{path}} != train/1.tar"
    dataset = load_dataset(command, allow_commands=True)
    with pytest.raises(VlkrError, match=r'train/1\.tar" ends with 1: '):
        list(dataset.source("train"))
    assert len(list(dataset.source("test"))) == 24


def test_sizes_of_a_packed_dataset_are_known(tmp_path):
    folder = write_shards(tmp_path / "d")
    manifest = {"splits": {"train": {"samples": 24}, "test": {"samples": 24}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_dataset(folder).sizes == {"train": 24, "test": 24}
    for content in ("{", "[]", '{"splits": {"train": {"samples": 1}}}', '{"splits": 1}'):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(VlkrError, match=r"manifest\.json is not valid: "):
            load_dataset(folder)


def test_a_damaged_shard_is_fetched_anew(tmp_path):
    """What the server mends is not hidden by the copy in the cache."""
    served = write_shards(tmp_path / "served", per_class=2)
    shard = served / "train" / "0.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700])
    with serving(served) as server:
        source = load_dataset(server.url).source("train")
        for _ in range(2):
            with pytest.raises(VlkrError, match=r"cannot read shard http.*/train/0.tar"):
                list(source)
        assert [path for path, _ in server.requests].count("train/0.tar") == 2
        shard.write_bytes(whole)
        assert len(list(source)) > 0
        seen = len(server.requests)
        list(source)
        assert len(server.requests) == seen


def test_long_downloads_show_their_progress(tmp_path, monkeypatch, capsys):
    (tmp_path / "long.tar").write_bytes(bytes(3 * 2**20))
    (tmp_path / "short.tar").write_bytes(bytes(100))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    with serving(tmp_path) as server:
        root = open_root(server.url)
        root.open("short.tar").close()
        assert capsys.readouterr().err == ""
        root.open("long.tar").close()
    assert "long.tar" in capsys.readouterr().err
