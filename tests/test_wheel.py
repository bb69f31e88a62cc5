"""The wheel alone is enough: built, unpacked into an empty folder, and used from another."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT

from vlkr import __version__

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs Python in an empty folder with nothing of the checkout but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, wheel], check=True, timeout=300)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        return done

    run.target, run.elsewhere = target, elsewhere
    return run


def test_holds_the_package_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"vlkr", f"vlkr-{__version__}.dist-info"}
    for name in (
        "cli/__init__.py",
        "configs/fewshot/digits.yaml",
        "data/digits.yaml",
        "data/digits/train/0.tar",
        "models/tiny_clip/open_clip_model.safetensors",
    ):
        assert f"vlkr/{name}" in names
    assert not [name for name in names if "__pycache__" in name or "tests" in name]
    assert wheel.stat().st_size < 10e6


def test_version(run):
    assert run("-m", "vlkr", "--version").stdout == f"vlkr {__version__}\n"
    script = run.target / "bin" / "vlkr"
    assert run(script, "--version").stdout == f"vlkr {__version__}\n"


def test_checkout_is_not_used(run):
    code = (
        "import vlkr, vlkr.files; print(vlkr.__file__); "
        "print(vlkr.files.resource('data/digits.yaml')); "
        "print(vlkr.files.resource('configs/fewshot/digits.yaml'))"
    )
    paths = run("-c", code).stdout.splitlines()
    assert all(path.startswith(str(run.target)) for path in paths)


def test_demo_runs_from_an_empty_folder(run):
    done = run("-m", "vlkr", "demo", "--quick", "--json")
    output = run.elsewhere / "runs" / "demo"
    assert {path.name for path in run.elsewhere.iterdir()} == {"runs"}
    assert {path.name for path in output.iterdir()} == {
        "accuracy.png",
        "export",
        "report.md",
        "results.json",
        "runs",
    }
    printed = json.loads(done.stdout)
    assert printed == json.loads((output / "results.json").read_text())
    assert set(printed["evaluations"]) == {"zero-shot", "kradapter", "lora"}
    accuracy = {
        method: [result["metrics"]["acc1"] for result in evaluations[0]["results"]]
        for method, evaluations in printed["evaluations"].items()
    }
    assert {len(values) for values in accuracy.values()} == {7}
    # Even few steps at home help there: 540 images, a standard error of about 2 points.
    assert accuracy["kradapter"][0] > accuracy["zero-shot"][0] > 0.4
    assert accuracy["lora"][0] > accuracy["zero-shot"][0]
    kradapter, lora = printed["parameters"].values()
    assert abs(kradapter - lora) < 0.05 * kradapter
    assert "Traceback" not in done.stderr
    assert "warning" not in done.stderr.lower()
