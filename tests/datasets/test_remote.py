import hashlib
import random
import socket
from pathlib import Path

import pytest
from helpers import write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import serving

from vlkr.datasets import load_dataset, remote
from vlkr.datasets.remote import MissingError, Retry, download
from vlkr.errors import VlkrError

DATA = random.Random(0).randbytes(3_000_000)
QUICK = Retry(attempts=4, backoff=0.001, timeout=0.3)
HARMLESS = [
    "drop",
    "reset",
    "stall",
    "short",
    "refuse",
    "lie",
    "wrong range",
    408,
    425,
    429,
    500,
    502,
    503,
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


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("step", HARMLESS)
def test_what_a_server_may_do_once_is_made_good(server, tmp_path, step, tags, ranges):
    server.plan["file"], server.tags, server.ranges = [step], tags, ranges
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
        ("short", "the server does not tell how much it sends"),
        (500, "the server answers 500 Internal Server Error"),
        (429, "the server answers 429 Too Many Requests"),
    ],
)
def test_what_stays_wrong_is_one_error(server, tmp_path, step, reason):
    server.plan["file"], server.ranges = [step] * 99, False
    with pytest.raises(VlkrError, match=rf"cannot read {server.url}/file, after 4 .*: .*{reason}"):
        fetch(server, tmp_path / "t")
    # The first answer that brings something new does not count as one in vain.
    assert len(server.requests) in (4, 5)


def test_dropping_again_and_again_without_ranges_is_an_error(server, tmp_path):
    server.plan["file"], server.ranges = ["drop"] * 99, False
    with pytest.raises(VlkrError, match="after 4 attempts in vain: 1,500,000 of 3,000,000 bytes"):
        fetch(server, tmp_path / "t")


@pytest.mark.parametrize("status", [404, 410])
def test_a_missing_file_is_told_at_once(server, tmp_path, status):
    server.plan["file"] = [status]
    with pytest.raises(MissingError, match=rf"nothing at {server.url}/file: .* {status} "):
        fetch(server, tmp_path / "t")
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "hint"), [(400, ""), (401, "token"), (403, "token"), (451, "")])
def test_another_refusal_is_told_at_once(server, tmp_path, status, hint):
    server.plan["file"] = [status]
    with pytest.raises(VlkrError, match=rf"the server answers {status} .*{hint}"):
        fetch(server, tmp_path / "t")
    assert len(server.requests) == 1


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(VlkrError, match=r"after 4 attempts in vain: .*refused"):
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
    with pytest.raises(VlkrError):
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
    with pytest.raises(VlkrError, match=r"SHA-256 \w{12}, the server tells 000000000000"):
        fetch(server, tmp_path / "t", "lfs")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_no_fault_of_the_server(server):
    with pytest.raises(VlkrError, match="cannot write /dev/full: No space left on device"):
        fetch(server, Path("/dev/full"))
    assert len(server.requests) == 1


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
