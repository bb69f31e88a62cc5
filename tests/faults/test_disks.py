"""Disks that are full, read-only or lie, and folders that two want: told, and nothing is lost."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from filelock import FileLock
from helpers import small_run, tree, write_images

from vlkr.config import TrainerConfig
from vlkr.errors import VlkrError
from vlkr.files import atomic_file, atomic_folder, check_free, exclusive, write_text

pytestmark = pytest.mark.faults

DISK = "storage"
CHECKPOINT = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def unbroken(small, colors, tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("whole") / "run", small, colors).output


@contextmanager
def small_disk(folder, size):
    """A file system of so many KiB at ``folder``; needs the right to mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leaves no byte free."""
    space = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize))


@pytest.mark.parametrize("size", [4, 40, 120, 200])
def test_a_disk_that_fills_up_while_training(tmp_path, small, colors, case, size, unbroken):
    with case(DISK), small_disk(tmp_path / "disk", size) as disk:
        run = disk / "run"
        with pytest.raises(VlkrError, match=r"cannot write .*No space left|No space left"):
            small_run(run, small, colors)
        assert not (run / "adapter").exists() or not (run / "metrics.json").exists()
        assert not [p for p in run.rglob(".*") if p.name != ".lock"]
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        option = {"resume": True} if (run / CHECKPOINT).is_file() else {"force": True}
        small_run(run, small, colors, **option)
        for name in ("adapter/adapter_model.safetensors", "report.md"):
            assert (run / name).read_bytes() == (unbroken / name).read_bytes()


def test_a_full_disk_keeps_what_was_there(tmp_path, case):
    with small_disk(tmp_path / "disk", 100) as disk:
        write_text(disk / "file", "old")
        write_text(disk / "folder" / "file", "old")
        before = tree(disk)
        fill(disk)
        for write in (_write_file, _write_folder):
            with case(DISK), pytest.raises(VlkrError, match=r"cannot write .*No space left"):
                write(disk)
        (disk / "filler").unlink()
        assert tree(disk) == before


def _write_file(disk):
    with atomic_file(disk / "file") as temporary:
        temporary.write_bytes(bytes(10_000))


def _write_folder(disk):
    with atomic_folder(disk / "folder", force=True) as temporary:
        (temporary / "file").write_bytes(bytes(10_000))


def test_a_disk_that_is_read_only(tmp_path, small, colors, case):
    with case(DISK), small_disk(tmp_path / "disk", 1000) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(VlkrError, match="cannot write"):
            small_run(disk / "run", small, colors)


def test_images_that_vanish_are_told(tmp_path, small, case):
    root = write_images(tmp_path / "images", splits=("train", "test"))
    from vlkr.datasets import BadSample, load_dataset

    dataset = load_dataset(root)
    for path in (root / "train" / "red").iterdir():
        path.unlink()
    with case(DISK):
        bad = [s for s in dataset.source("train") if isinstance(s, BadSample)]
        assert {s.key for s in bad} == {f"red/{i}.png" for i in range(12)}
        assert all("cannot be read from" in s.reason for s in bad)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
    ],
    ids=["empty", "half", "short by one", "long by one", "zeros"],
)
def test_a_half_written_checkpoint_is_refused_and_kept(
    tmp_path, small, colors, case, damage, unbroken
):
    shutil.copytree(unbroken, tmp_path / "run")
    checkpoint = tmp_path / "run" / CHECKPOINT
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    before = tree(tmp_path)
    with case("flipped bytes: checkpoint"):
        with pytest.raises(VlkrError, match=r"last\.ckpt is damaged"):
            small_run(tmp_path / "run", small, colors, resume=True)
        assert tree(tmp_path) == before


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path, case, is_long, unbroken):
    from vlkr.training.trainer import check_checkpoint

    path = tmp_path / "last.ckpt"
    whole = (unbroken / CHECKPOINT).read_bytes()
    step = 97 if is_long else 9973
    for place in [*range(0, len(whole), step), *range(len(whole) - 90, len(whole))]:
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        told = pytest.raises(VlkrError, match=r"last\.ckpt is damaged")
        with case("flipped bytes: checkpoint"), told:
            check_checkpoint(path)
    path.write_bytes(whole)
    check_checkpoint(path)


REFUSED = {
    "state_dict": (None, r"last\.ckpt is damaged"),
    "optimizer_states": ([{}], r"last\.ckpt is damaged"),
    "lr_schedulers": (None, r"last\.ckpt is damaged"),
    "pytorch-lightning_version": (None, r"last\.ckpt is damaged"),
    "base_sha256": (None, "base weights"),
}
HARMLESS = {"loops": {"fit_loop": {}}, "train_loader": {"epoch": "x"}, "global_step": None}


def test_a_checkpoint_of_another_structure_is_refused(tmp_path, small, colors, case, unbroken):
    from vlkr.training.trainer import SealedCheckpoints

    def resume(changes):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(unbroken, tmp_path / "run")
        SealedCheckpoints().save_checkpoint(saved | changes, tmp_path / "run" / CHECKPOINT)
        small_run(tmp_path / "run", small, colors, resume=True)

    saved = torch.load(unbroken / CHECKPOINT, weights_only=True)
    for key, (value, message) in REFUSED.items():
        with case("hostile files: checkpoint"), pytest.raises(VlkrError, match=message):
            resume({key: value})
    # Of a run that is finished nothing but the weights is used.
    for changes in ({}, *({key: value} for key, value in HARMLESS.items())):
        with case("hostile files: checkpoint"):
            resume(changes)
            adapter = "adapter/adapter_model.safetensors"
            assert (tmp_path / "run" / adapter).read_bytes() == (unbroken / adapter).read_bytes()


def test_a_pickled_checkpoint_is_never_run(tmp_path, small, colors, case, unbroken):
    from vlkr.training.trainer import SealedCheckpoints

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    shutil.copytree(unbroken, tmp_path / "run")
    saved = torch.load(unbroken / CHECKPOINT, weights_only=True)
    SealedCheckpoints().save_checkpoint(saved | {"x": Bomb()}, tmp_path / "run" / CHECKPOINT)
    with case("hostile files: checkpoint"):
        with pytest.raises(VlkrError, match=r"last\.ckpt is damaged"):
            small_run(tmp_path / "run", small, colors, resume=True)
        assert not (tmp_path / "executed").exists()


def test_a_second_process_is_kept_out(tmp_path, small, colors, case):
    run = tmp_path / "run"
    told = pytest.raises(VlkrError, match="in use by another process")
    with case("one folder, two processes"), exclusive(run), told:
        small_run(run, small, colors)
    with case("one folder, two processes"):
        small_run(run, small, colors)


def test_a_stale_lock_keeps_nobody_out(tmp_path, small, colors, case):
    run = tmp_path / "run"
    run.mkdir()
    with case("one folder, two processes"):
        lock = FileLock(run / ".lock")
        lock.acquire()
        lock.release()
        (run / ".lock").touch()
        trainer = TrainerConfig(epochs=1, accelerator="cpu", progress=False)
        small_run(run, small, colors, trainer=trainer)


def dead_process():
    with subprocess.Popen(["true"]) as process:
        process.wait()
        return process.pid


def test_what_killed_processes_left_is_swept_up(tmp_path, case):
    from vlkr.files import _HOST

    dead, alive = dead_process(), os.getpid()
    left = [f".file.{_HOST}-{dead}.abc", f".file.{_HOST}-{alive}.abc", ".file.other-1.abc"]
    for name in left:
        (tmp_path / name).write_text("half")
    with case("rubbish of killed processes"):
        write_text(tmp_path / "file", "new")
        assert {p.name for p in tmp_path.iterdir()} == {"file", *left[1:]}


def test_a_folder_that_was_being_replaced_comes_back(tmp_path, case):
    from vlkr.files import _HOST

    dead = dead_process()
    write_text(tmp_path / f".out.old.{_HOST}-{dead}.abc" / "one", "old")
    write_text(tmp_path / f".out.{_HOST}-{dead}.abc" / "one", "half")
    with case("rubbish of killed processes"):
        with pytest.raises(VlkrError, match="exists already"), atomic_folder(tmp_path / "out"):
            pass
        assert tree(tmp_path) == {"out": None, "out/one": b"old"}
        check_free(tmp_path / "out", force=True)
