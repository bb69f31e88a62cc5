import os

import pytest
from helpers import tree

from vlkr.errors import VlkrError
from vlkr.files import (
    atomic_file,
    atomic_folder,
    check_free,
    read_json,
    read_yaml,
    resource,
    write_json,
    write_text,
)

DISK_FULL = OSError(28, "No space left on device")
RAISED = {KeyboardInterrupt: KeyboardInterrupt, RuntimeError: RuntimeError, DISK_FULL: VlkrError}


def test_atomic_file_makes_folders_and_leaves_nothing_but_the_file(tmp_path):
    with atomic_file(tmp_path / "a" / "b.txt") as temporary:
        assert temporary.parent == tmp_path / "a"
        temporary.write_text("new")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert tree(tmp_path) == {"a": None, "a/b.txt": b"new"}
    assert (tmp_path / "a" / "b.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", RAISED)
def test_interrupted_atomic_file_keeps_the_old_one(tmp_path, error):
    (tmp_path / "b.txt").write_text("old")

    def interrupted():
        with atomic_file(tmp_path / "b.txt") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(RAISED[error], match=r"^$|No space left"):
        interrupted()
    assert tree(tmp_path) == {"b.txt": b"old"}


def test_atomic_folder_gets_its_name_when_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "one").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/one": b"1"}
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755


def test_atomic_folder_replaces_an_empty_folder_and_a_full_one_only_when_told(tmp_path):
    target = tmp_path / "b"
    target.mkdir()
    with atomic_folder(target) as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(VlkrError, match="exists already"), atomic_folder(target):
        raise AssertionError("the block must not run")
    assert tree(tmp_path) == {"b": None, "b/one": b"1"}
    with atomic_folder(target, force=True) as temporary:
        (temporary / "two").write_text("2")
    assert tree(tmp_path) == {"b": None, "b/two": b"2"}


@pytest.mark.parametrize("error", RAISED)
@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_atomic_folder_keeps_the_old_one(tmp_path, error, existing):
    target = tmp_path / "b"
    if existing:
        write_text(target / "one", "1")
    before = tree(tmp_path)

    def interrupted():
        with atomic_folder(target, force=True) as temporary:
            (temporary / "two").write_text("2")
            raise error

    with pytest.raises(RAISED[error], match=r"^$|No space left"):
        interrupted()
    assert tree(tmp_path) == before


def test_failing_rename_gives_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "b"
    write_text(target / "one", "1")
    before = tree(tmp_path)
    replace = type(target).replace

    def fail_once(path, goal):
        if path != target and goal == target and (path / "two").exists():
            raise OSError(28, "No space left on device")
        return replace(path, goal)

    monkeypatch.setattr(type(target), "replace", fail_once)
    with (
        pytest.raises(VlkrError, match="No space left"),
        atomic_folder(target, force=True) as temporary,
    ):
        (temporary / "two").write_text("2")
    assert tree(tmp_path) == before


def test_check_free(tmp_path, monkeypatch):
    check_free(tmp_path / "new" / "deeper")
    check_free(tmp_path)
    write_text(tmp_path / "file", "")
    with pytest.raises(VlkrError, match="exists already; name another folder, or --force"):
        check_free(tmp_path)
    check_free(tmp_path, force=True)
    with pytest.raises(VlkrError, match="is a file, expected a folder"):
        check_free(tmp_path / "file", force=True)
    with pytest.raises(VlkrError, match=r"cannot write .*deeper: .*file is a file"):
        check_free(tmp_path / "file" / "deeper", force=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(VlkrError, match="no permission to write in"):
        check_free(tmp_path / "new" / "deeper")


def test_what_cannot_be_written_is_told(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(VlkrError, match="cannot write"):
        write_text(tmp_path / "file" / "inside", "")
    with (
        pytest.raises(VlkrError, match="cannot write"),
        atomic_folder(tmp_path / "file" / "inside"),
    ):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(VlkrError, match="cannot write"):
        write_text(tmp_path / "folder", "")
    assert tree(tmp_path) == {"file": b"", "folder": None}


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", "is not valid"),
        (b"\xff\xfe\x00", "is not valid"),
        (b"[1]", "holds a list, expected a mapping"),
        (b"null", "holds nothing, expected a mapping"),
    ],
)
def test_reading_what_is_no_mapping(tmp_path, read, content, message):
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(VlkrError, match=message) as raised:
        read(tmp_path / "f")
    assert str(tmp_path / "f") in str(raised.value)


def test_json_and_yaml_round_trip(tmp_path):
    value = {"text": "Grüße", "list": [1, 2.5, None]}
    write_json(tmp_path / "f", value)
    assert read_json(tmp_path / "f") == value
    assert read_yaml(tmp_path / "f") == value


@pytest.mark.parametrize("name", ["configs/fewshot/digits.yaml", "data/digits.yaml"])
def test_resources_are_found(name):
    assert resource(name).is_file()
