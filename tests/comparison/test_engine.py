"""Cells: skipped when finished, resumed when interrupted, alone when they fail."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
from filelock import FileLock
from grids import compare
from helpers import tree

from vlkr.comparison import cell as cells
from vlkr.comparison.cell import run_cell
from vlkr.comparison.engine import run_cells
from vlkr.comparison.options import MethodConfig
from vlkr.comparison.plan import Cell
from vlkr.comparison.results import CellFolder
from vlkr.errors import VlkrError
from vlkr.files import read_json

METHODS = ["zero-shot", "probe", "kradapter", "lora"]
TIMES = ("seconds", "train_seconds", "peak_memory_mib", "memory_of")


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A finished grid."""
    output = tmp_path_factory.mktemp("grid") / "out"
    return compare(output, methods=METHODS, **options)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(finished.output, tmp_path / "copy")
    return tmp_path / "copy"


def results(output):
    """What the cells found, without what differs from run to run."""
    found = {}
    for path in sorted(output.glob("cells/*/result.json")):
        result = read_json(path)
        found[path.parent.name] = {k: v for k, v in result.items() if k not in TIMES}
    return found


def test_a_cell_is_a_folder(finished):
    assert len(results(finished.output)) == 1 + 3 * 2
    folder = finished.output / "cells" / "colors-shots2-lora-lr0.01-epochs1-seed2"
    assert {path.name for path in folder.iterdir()} == {
        "cell.json",
        "lock",
        "predictions.safetensors",
        "result.json",
        "run",
    }
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "run" / "checkpoints").exists()
    assert read_json(folder / "result.json")["seconds"] > 0


def test_finished_cells_are_skipped(copied, options, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a finished cell is computed again")

    monkeypatch.setattr(cells, "_evaluate", refuse)
    before = {path: data for path, data in tree(copied).items() if path.startswith("cells")}
    report = compare(copied, methods=METHODS, **options)
    after = {path: data for path, data in tree(copied).items() if path.startswith("cells")}
    assert after == before
    assert not report.results.failures


def test_a_new_seed_computes_its_cells_alone(copied, options, monkeypatch):
    asked = []
    measure = cells._evaluate
    monkeypatch.setattr(cells, "_evaluate", lambda c, *rest: asked.append(c) or measure(c, *rest))
    compare(copied, methods=METHODS, **(options | {"seeds": [1, 2, 3]}))
    assert {cell.seed for cell in asked} == {3}
    assert len(asked) == 3


def test_another_configuration_is_refused_and_forced(copied, options):
    changed = options | {"optimizer": replace(options["optimizer"], weight_decay=0.5)}
    before = tree(copied)
    with pytest.raises(VlkrError, match=r"optimizer.weight_decay is 0\.5 now and was 0\.1"):
        compare(copied, methods=["lora"], **changed)
    assert tree(copied) == before
    compare(copied, methods=["lora"], force=True, **changed)
    name = "colors-shots2-lora-lr0.01-epochs1-seed1"
    assert (
        read_json(copied / "cells" / name / "cell.json")["cell"]["optimizer"]["weight_decay"] == 0.5
    )


def test_what_does_not_change_results_does_not_count(copied, options, monkeypatch):
    monkeypatch.setattr(cells, "_evaluate", lambda *arguments: 1 / 0)
    data = replace(options["data"], num_workers=1)
    trainer = replace(options["trainer"], accelerator="auto")
    changed = options | {"data": data, "trainer": trainer}
    assert not compare(copied, methods=METHODS, **changed).results.failures


def test_a_foreign_folder_is_left_alone(options, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(VlkrError, match="exists already"):
        compare(tmp_path, methods=["zero-shot"], **options)
    assert set(tree(tmp_path)) == {"thesis.tex"}


def test_a_failing_cell_stops_nobody(options, tmp_path, capsys):
    methods = [
        MethodConfig("lora", options={"rank": 2}, lrs=[1e-2, 1e30]),
        MethodConfig("bitfit", lrs=[1e30]),
        "kradapter",
    ]
    report = compare(tmp_path / "out", methods=methods, budget="own", **options)
    failures = report.results.failures
    assert len(failures) == 4
    assert all("loss is" in message or "not finite" in message for message in failures.values())
    lora, bitfit, kradapter = report.results.selected
    assert lora.chosen.setting["lr"] == 1e-2
    assert (len(lora.results), len(bitfit.results), len(kradapter.results)) == (2, 0, 2)
    assert any("1e+30" in row[0] for row in report.tables()[-1].rows)
    assert "failed" in capsys.readouterr().err
    folder = CellFolder.of(report.output, next(iter(failures)))
    assert "Traceback" in read_json(folder.error)["traceback"]
    # The model is clean again after a failure: another cell gives what it gives on its own.
    alone = compare(tmp_path / "alone", methods=["kradapter"], **options)
    assert alone.results.selected[0].values("colors") == kradapter.values("colors")


def test_failed_cells_are_tried_again(copied, options, monkeypatch):
    measure = cells._evaluate
    (copied / "cells" / "colors-zero_shot" / "result.json").unlink()
    monkeypatch.setattr(cells, "_evaluate", lambda *arguments: 1 / 0)
    report = compare(copied, methods=METHODS, **options)
    assert report.results.failures == {"colors-zero_shot": "ZeroDivisionError: division by zero"}
    monkeypatch.setattr(cells, "_evaluate", measure)
    report = compare(copied, methods=METHODS, **options)
    assert not report.results.failures
    assert not (copied / "cells" / "colors-zero_shot" / "error.json").exists()


def test_says_when_every_cell_failed(options, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "_evaluate", lambda *arguments: 1 / 0)
    with pytest.raises(VlkrError, match=r"every cell failed; .*division by zero"):
        compare(tmp_path / "out", methods=["zero-shot"], **options)


def test_an_interrupted_cell_goes_on_from_its_epoch(finished, options, tmp_path, monkeypatch):
    from vlkr.training import recipe

    fit = recipe.fit

    def interrupted(*arguments, **keywords):
        fit(*arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt, match="0 of 2 cells are finished, the same command"):
        compare(tmp_path / "out", methods=["lora"], **options)
    assert (tmp_path / "out/cells/colors-shots2-lora-lr0.01-epochs1-seed1/run/checkpoints").is_dir()
    asked = []
    monkeypatch.setattr(
        recipe, "fit", lambda *a, resume, **k: asked.append(resume) or fit(*a, resume=resume, **k)
    )
    report = compare(tmp_path / "out", methods=["lora"], **options)
    assert asked == [True, False]
    own = {k: v for k, v in results(finished.output).items() if "lora" in k}
    assert results(report.output) == own
    assert all(found["val_acc1"] is not None for found in own.values())


def test_a_locked_cell_is_left_to_its_process(options, tmp_path):
    output = tmp_path / "out"
    name = "colors-zero_shot"
    folder = output / "cells" / name
    folder.mkdir(parents=True)
    (output / "plan.json").write_text("{}")
    with FileLock(folder / "lock"):
        report = compare(output, methods=["zero-shot", "probe"], **options)
    assert report.results.unfinished == [name]
    assert (name, "not finished") in report.tables()[-1].rows


@pytest.mark.parametrize("keep", [0, 40, -5])
def test_damaged_predictions_are_told(copied, options, keep):
    [path] = copied.glob("cells/*-lora-*-seed2/predictions.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VlkrError, match=r"cannot read .*lora.*predictions\.safetensors"):
        compare(copied, methods=METHODS, jobs=0, **options)


def test_an_unfinished_place_has_no_reliability(copied, options):
    report = compare(copied, methods=["zero-shot", "lora"], shots=[1, 2, 3], jobs=0, **options)
    names = [picture.name for picture in report.pictures]
    assert "reliability" in names  # for zero-shot stands for any number of shots
    report = compare(copied, methods=["lora"], shots=[2, 3], jobs=0, **options)
    assert "reliability" not in [picture.name for picture in report.pictures]
    assert (copied / "report.html").is_file()


def test_no_jobs_only_collects(copied, options):
    shutil.rmtree(copied / "cells" / "colors-zero_shot")
    report = compare(copied, methods=METHODS, jobs=0, **options)
    assert report.results.unfinished == ["colors-zero_shot"]


def test_a_killed_worker_fails_its_cell_and_no_other(options, tmp_path):
    """A real SIGKILL of the process that trains a cell."""
    output = tmp_path / "out"
    name = "colors-shots2-lora-lr0.01-epochs500-seed1"
    folder = output / "cells" / name

    def kill():
        while not (folder / "run" / "config.yaml").is_file():  # it does not train yet
            time.sleep(0.05)
        for process in psutil.Process().children():
            if str(folder / "lock") in [file.path for file in process.open_files()]:
                process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    methods = [MethodConfig("lora", epochs=[500]), "zero-shot"]
    report = compare(output, methods=methods, jobs=2, **(options | {"seeds": [1]}))
    killer.join()
    [message] = report.results.failures.values()
    logs = re.escape(str(output / "logs"))
    assert re.fullmatch(
        rf"ProcessDied: its process ended with SIGKILL, see {logs}/process-[12]\.log", message
    )
    assert list(report.results.failures) == [name]
    assert list(report.results.cells) == ["colors-zero_shot"]


SCRIPT = """
import sys
from vlkr.cli import main

print("imported")
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_workers_find_the_same_and_run_no_script_again(finished, options, tmp_path):
    """The command line, called by a script that does not guard its ``__main__``."""
    (tmp_path / "script.py").write_text(SCRIPT)
    data = options["data"]
    chosen = {
        "output": tmp_path / "out",
        "methods": "[zero-shot, probe, kradapter, lora]",
        "jobs": 2,
        "model": options["model"],
        "data.root": data.root,
        "data.shots": data.shots,
        "data.batch-size": data.batch_size,
        "data.min-steps-per-epoch": data.min_steps_per_epoch,
        "optimizer.lr": options["optimizer"].lr,
        "trainer.epochs": 1,
        "trainer.accelerator": "cpu",
        "seeds": "[1, 2]",
    }
    arguments = [f"--{name}={value}" for name, value in chosen.items()]
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", "compare", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("imported") == 1
    assert results(tmp_path / "out") == results(finished.output)
    logs = sorted((tmp_path / "out" / "logs").iterdir())
    assert [path.name for path in logs] == ["process-1.log", "process-2.log"]
    assert not any("imported" in path.read_text() for path in logs)


@pytest.mark.slow
def test_launcher_runs_each_cells_command(finished, options, tmp_path):
    report = compare(
        tmp_path / "out",
        methods=["zero-shot"],
        launcher=f"sh -c '{{command}} && touch {tmp_path}/{{cell}}.done'",
        **options,
    )
    assert (tmp_path / "colors-zero_shot.done").is_file()
    name = "colors-zero_shot"
    assert results(report.output)[name] == results(finished.output)[name]


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("sh -c 'echo full queue >&2; exit 3' {command}", "full queue"),
        ("/no/such/sbatch {command}", "No such file"),
    ],
)
def test_a_launcher_that_fails_is_reported(options, tmp_path, launcher, message):
    with pytest.raises(VlkrError, match=f"every cell failed; .*{message}"):
        compare(tmp_path / "out", methods=["zero-shot"], launcher=launcher, **options)


def test_a_launcher_that_only_submits_says_how_to_collect(options, tmp_path):
    with pytest.raises(VlkrError, match=r"none of 1 cells is finished yet; .*--jobs 0"):
        compare(tmp_path / "out", methods=["zero-shot"], launcher="true {command}", **options)


def test_one_cell_by_its_name(copied):
    name = "colors-shots2-probe-seed1"
    before = results(copied)
    shutil.rmtree(copied / "cells" / name)
    done = run_cells(copied, [name])
    assert done.to_json() == {"cells": {name: "finished"}}
    assert results(copied) == before
    with pytest.raises(VlkrError, match="no cell 'nobody'"):
        run_cells(copied, ["nobody"])
    with pytest.raises(VlkrError, match="no plan in"):
        run_cells(copied / "cells", ["all"])


def test_a_named_cell_that_fails_is_an_error(copied, monkeypatch):
    name = "colors-zero_shot"
    shutil.rmtree(copied / "cells" / name)
    monkeypatch.setattr(cells, "_evaluate", lambda *arguments: 1 / 0)
    with pytest.raises(VlkrError, match=f"cell {name} failed: division by zero"):
        run_cells(copied, [name])
    assert run_cells(copied, ["all"]).cells[name].startswith("failed")


def test_a_cell_survives_json(finished):
    for path in finished.output.glob("cells/*/cell.json"):
        found = json.loads(path.read_text())
        cell = Cell.from_json(found["cell"])
        assert cell.hash == found["hash"]
        assert cell.to_json() == found["cell"]
        assert run_cell(cell, CellFolder(path.parent))
