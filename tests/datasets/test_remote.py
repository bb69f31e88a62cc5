import hashlib
import json
import random
import socket
from pathlib import Path

import pytest
from helpers import write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import serving

from vlkr.caching import MissingError
from vlkr.datasets import load_dataset, remote
from vlkr.datasets.remote import LocalRoot, Retry, download, open_root
from vlkr.errors import VlkrError

DATA = random.Random(0).randbytes(3_000_000)
QUICK = Retry(attempts=4, backoff=0.001, timeout=0.3)
HARMLESS = [
    *("drop", "reset", "stall", "short", "refuse", "lie", "wrong range"),
    *(408, 425, 429, 500, 502, 503),
]


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "file").write_bytes(DATA)
    with serving(folder) as found:
        yield found


def fetch(server, target, name="file", **options):
    options = {"retry": QUICK} | options
    return download(f"{server.url}/{name}", target, **options)


def test_a_whole_file(server, tmp_path):
    sizes = []
    assert fetch(server, tmp_path / "t", on_size=sizes.append) == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "t").read_bytes() == DATA
    assert sizes == [len(DATA)]
    assert server.requests == [("file", None)]


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("step", HARMLESS)
def test_what_a_server_may_do_once_is_made_good(server, tmp_path, step, resumable):
    server.tags = server.ranges = resumable
    server.plan["file"] = ["drop", step] if step == "wrong range" else [step]
    assert fetch(server, tmp_path / "t") == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "t").read_bytes() == DATA
    assert len(server.requests) >= 2


def test_goes_on_where_the_last_answer_ended(server, tmp_path):
    server.plan["file"] = ["drop"] * 9  # more than attempts, but each brings something new
    fetch(server, tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == DATA
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for _, r in server.requests[1:]]
    assert starts[0] == len(DATA) // 2
    assert starts == sorted(starts)
    assert len(starts) == 9


def test_a_file_that_changes_between_two_answers_is_read_anew(server, tmp_path):
    server.plan["file"] = ["drop"]
    other = DATA[::-1]

    def change(size):
        (server.folder / "file").write_bytes(other)

    assert fetch(server, tmp_path / "t", on_size=change) == hashlib.sha256(other).hexdigest()
    assert (tmp_path / "t").read_bytes() == other


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("lie", "3,000,000 of 3,000,001 bytes came"),
        ("refuse", "Remote end closed connection without response"),
        ("stall", "timed out"),
        ("short", "the server does not state the length of its answer"),
        (500, "the server answers 500 Internal Server Error"),
        (429, "the server answers 429 Too Many Requests"),
    ],
)
def test_what_stays_wrong_is_one_error(server, tmp_path, step, reason):
    server.plan["file"], server.ranges = [step] * 99, False
    with pytest.raises(
        VlkrError, match=rf"cannot read {server.url}/file, giving up after 4 .*: .*{reason}"
    ):
        fetch(server, tmp_path / "t")
    # The first answer that brings something new does not count as one in vain.
    assert len(server.requests) in (4, 5)


def test_dropping_again_and_again_without_ranges_is_an_error(server, tmp_path):
    server.plan["file"], server.ranges = ["drop"] * 99, False
    with pytest.raises(VlkrError, match="giving up after 4 attempts: 1,500,000 of 3,000,000 bytes"):
        fetch(server, tmp_path / "t")


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (404, MissingError, "nothing at .*/file: the server answers 404"),
        (410, MissingError, "nothing at .*/file: the server answers 410"),
        (400, VlkrError, "cannot read .*/file: the server answers 400"),
        (401, VlkrError, "the server answers 401 .*is a token needed"),
        (403, VlkrError, "the server answers 403 .*is a token needed"),
        (451, VlkrError, "the server answers 451"),
    ],
)
def test_a_refusal_is_told_at_once(server, tmp_path, status, kind, message):
    server.plan["file"] = [status]
    with pytest.raises(VlkrError, match=message) as error:
        fetch(server, tmp_path / "t")
    assert type(error.value) is kind
    assert len(server.requests) == 1


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(VlkrError, match=r"giving up after 4 attempts: .*refused"):
        download(f"http://127.0.0.1:{port}/x", tmp_path / "t", retry=QUICK)


def test_a_host_that_does_not_exist_is_told_at_once(tmp_path, monkeypatch):
    def resolve(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(VlkrError, match=r"cannot read http://nowhere/x: .*Name or service not kno"):
        download("http://nowhere/x", tmp_path / "t")


def test_waits_longer_each_time_and_as_long_as_the_server_asks(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    server.plan["file"] = [500] * 99
    with pytest.raises(VlkrError):
        fetch(server, tmp_path / "t", retry=Retry(attempts=6, backoff=1.0, timeout=1))
    assert len(waits) == 5
    assert all(2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits))
    server.plan["file"], server.extra, waits[:] = [503], {"Retry-After": "7"}, []
    fetch(server, tmp_path / "t", retry=Retry(attempts=6, backoff=1.0, timeout=1))
    assert waits == [7]


def test_redirects_are_followed_without_the_token(server, tmp_path):
    with serving(server.folder) as other:
        server.plan["moved"] = [f"redirect {other.url}/file"]
        fetch(server, tmp_path / "t", "moved", token="secret")
        assert server.headers[0]["Authorization"] == "Bearer secret"
        assert "Authorization" not in other.headers[0]
    assert (tmp_path / "t").read_bytes() == DATA


@pytest.mark.parametrize("target", ["ftp://host/file", "file:///etc/passwd"])
def test_redirects_to_something_else_are_refused(server, tmp_path, target):
    server.plan["moved"] = [f"redirect {target}"]
    with pytest.raises(
        VlkrError, match=rf"moved.* redirects? .*{target}|'{target}' is not allowed"
    ):
        fetch(server, tmp_path / "t", "moved")
    assert len(server.requests) == 1


def test_redirect_from_https_to_http_is_refused():
    request = remote.urllib.request.Request("https://host/file")
    with pytest.raises(VlkrError, match="redirects to http://host/file, which is not https"):
        remote._Redirect().redirect_request(request, None, 302, "", {}, "http://host/file")


def test_the_hubs_checksum_is_held_against_the_file(server, tmp_path):
    server.plan["lfs"] = [f"redirect {server.url}/file"] * 9
    server.extra = {"X-Linked-ETag": f'"{hashlib.sha256(DATA).hexdigest()}"'}
    fetch(server, tmp_path / "t", "lfs")
    server.extra = {"X-Linked-ETag": f'"{"0" * 64}"'}
    with pytest.raises(VlkrError, match=r"SHA-256 \w{12}, the server states 000000000000"):
        fetch(server, tmp_path / "t", "lfs")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_no_fault_of_the_server(server):
    with pytest.raises(VlkrError, match="cannot write /dev/full: No space left on device"):
        fetch(server, Path("/dev/full"))
    assert len(server.requests) == 1


# Roots

HUB = "https://huggingface.co/datasets/"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY", Retry(attempts=2, backoff=0.001, timeout=2))
    monkeypatch.setenv("HF_TOKEN", "secret")


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("https://host/a/b", "https://host/a/b"),
        ("https://host/a/b/", "https://host/a/b"),
        ("hf://datasets/org/name", HUB + "org/name/resolve/main"),
        ("hf://datasets/org/name@v1.0/sub/folder/", HUB + "org/name/resolve/v1.0/sub/folder"),
        ("hf://datasets/org/name@refs%2Fpr%2F1", HUB + "org/name/resolve/refs%2Fpr%2F1"),
        ("wds/imagenet-r", HUB + "clip-benchmark/wds_imagenet-r/resolve/main"),
        ("wds/vtab/eurosat", HUB + "clip-benchmark/wds_vtab-eurosat/resolve/main"),
        (HUB + "clip-benchmark/wds_pets/tree/main", HUB + "clip-benchmark/wds_pets/resolve/main"),
    ],
)
def test_addresses(monkeypatch, reference, url):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert open_root(reference).where("test/0.tar") == f"{url}/test/0.tar"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    url = "https://mirror.example/datasets/clip-benchmark/wds_cars/resolve/main/x"
    assert open_root("wds/cars").where("x") == url


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("s3://bucket/a", "cannot read s3://bucket/a: s3:// is not known, expected https://, hf"),
        ("file:///etc", "file:// is not known"),
        ("hf://org/name", r"'hf://org/name' is not hf://datasets/ORG/NAME"),
        ("hf://datasets/name", "is not hf://datasets/ORG/NAME"),
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


@pytest.mark.usefixtures("cache")
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


@pytest.mark.usefixtures("cache")
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


@pytest.mark.usefixtures("cache")
def test_a_server_without_a_layout(tmp_path):
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as server:
        with pytest.raises(VlkrError, match=r"no class names in http://.*/x/classnames\.txt"):
            load_dataset(f"{server.url}/x")
        server.plan["y/classnames.txt"] = [500] * 9
        with pytest.raises(VlkrError, match=r"cannot read http://.*/y/classnames\.txt, giving up"):
            load_dataset(f"{server.url}/y")


@pytest.mark.usefixtures("cache")
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


@pytest.mark.usefixtures("cache")
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


@pytest.mark.usefixtures("cache")
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


@pytest.mark.usefixtures("cache")
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


@pytest.mark.usefixtures("cache")
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


@pytest.fixture(scope="module")
def shard_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_shards(folder / "colors", per_class=6, shards=3)
    with serving(folder) as found:
        yield found


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.sampled_from([*HARMLESS, 404, "behave"]), max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_an_epoch_is_complete_or_an_error(
    shard_server, tmp_path_factory, monkeypatch, steps, ranges, tags
):
    """Whatever the server does while the shards are read, no sample is lost silently."""
    monkeypatch.setattr(remote, "RETRY", Retry(attempts=3, backoff=0.001, timeout=0.1))
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path_factory.mktemp("cache")))
    server = shard_server
    server.plan, server.ranges, server.tags = {}, ranges, tags
    dataset = load_dataset(f"{server.url}/colors")
    expected = list(load_dataset(server.folder / "colors").source("train"))
    server.plan = {f"colors/train/{i}.tar": steps[i::3] for i in range(3)}
    try:
        samples = list(dataset.source("train"))
    except VlkrError:
        server.plan = {}  # nothing wrong is kept
        samples = list(dataset.source("train"))
    assert samples == expected
