"""What is there stays whole, whatever happens while an export is written."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import tree

from vlkr.cli import main
from vlkr.errors import VlkrError
from vlkr.export import export as command
from vlkr.export.export import export


def mount(folder, *options):
    return subprocess.run(["mount", *options, folder], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MB, where the system lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount(folder, "-t", "tmpfs", "-o", "size=5m", "tmpfs"):
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    "name",
    [
        "open_clip",
        "transformers",
        pytest.param("onnx", marks=pytest.mark.slow),
        pytest.param("torch", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_keeps_the_old_export(name, run, small_disk, capsys):
    output = small_disk / "out"
    export(run, output, format="adapter")
    (small_disk / "filler").write_bytes(bytes(2 * 2**20))
    before = tree(small_disk)
    arguments = ["export", "--run", str(run), "--format", name, "--output", str(output), "--force"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert f"vlkr: error: cannot write {output}" in capsys.readouterr().err
    assert tree(small_disk) == before
    assert main([*arguments[:-1], "--output", str(small_disk / "new")]) == 2
    assert tree(small_disk) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("module", "step"), [(command, "write_json"), (command, "save_file")])
def test_a_failing_write_keeps_the_old_export(run, tmp_path, monkeypatch, error, module, step):
    export(run, tmp_path / "out", format="adapter")
    before = tree(tmp_path)

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(module, step, fail)
    raised = VlkrError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(raised):
        export(run, tmp_path / "out", force=True)
    with pytest.raises(raised):
        export(run, tmp_path / "new")
    assert tree(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
save = safetensors.torch.save_file
def save_half(tensors, path, **options):
    save(tensors, path, **options)
    os.truncate(path, os.path.getsize(path) // 2)
    optional = {"onnx", "onnxruntime", "vlkr.export.timm", "vlkr.export.transformers"}
    print(*(optional & set(sys.modules)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = save_half
from vlkr.export.export import export
export(Path(sys.argv[1]), Path(sys.argv[2]), force=True)
"""


@pytest.mark.slow
def test_a_kill_in_mid_write_keeps_the_old_export(run, tmp_path):
    output = tmp_path / "out"
    export(run, output, format="adapter")
    before = tree(output)
    command = [sys.executable, "-c", KILLED, str(run), str(output)]
    done = subprocess.run(command, timeout=300, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "\n"  # nothing is imported that the format does not need
    assert tree(output) == before
    left = [path for path in tmp_path.iterdir() if path != output]
    assert [path.name.startswith(".out.") for path in left] == [True]
    export(run, output, force=True)
    assert (output / "open_clip_model.safetensors").is_file()
    assert list(tmp_path.iterdir()) == [output]  # nor does the next one leave what was half-written


def test_a_read_only_target(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount(folder, "-t", "tmpfs", "tmpfs")
    output = folder / "out"
    export(run, output, format="adapter")
    before = tree(tmp_path)
    try:
        if not mounted or not mount(folder, "-o", "remount,ro"):
            # Root may write everywhere, and here it may not mount.
            monkeypatch.setattr(os, "access", lambda path, mode: False)
        arguments = ["export", "--run", str(run), "--output", str(output), "--force"]
        assert main(arguments) == 2
        assert f"vlkr: error: cannot write {output}" in capsys.readouterr().err
        with pytest.raises(VlkrError, match="no permission to write in"):
            export(run, folder / "new" / "deeper")
        assert tree(tmp_path) == before
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def test_what_is_there_is_kept_unless_told(run, tmp_path):
    output = tmp_path / "out"
    export(run, output)
    before = tree(output)
    with pytest.raises(VlkrError, match="exists already; name another folder, or --force"):
        export(run, output)
    assert tree(output) == before
    export(run, output, force=True)
    assert tree(output) == before
    export(run, output, format="adapter", force=True)
    assert "open_clip_config.json" not in tree(output)


def test_force_replaces_exports_only(run, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(VlkrError, match="does not hold an export; --force replaces nothing else"):
        export(run, tmp_path / "home", force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [("file/inside", "file is a file"), ("file", "is a file, expected a folder")],
)
def test_a_file_of_that_name(run, tmp_path, output, message):
    (tmp_path / "file").touch()
    with pytest.raises(VlkrError, match=message):
        export(run, tmp_path / output, force=True)
    assert tree(tmp_path) == {"file": b""}
