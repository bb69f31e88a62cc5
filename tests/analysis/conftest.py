import pytest
from helpers import small_run, write_clip, write_images


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Name of a small CLIP with random weights."""
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    """Folder of images whose color tells their class."""
    return write_images(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="session")
def run(tmp_path_factory, small, colors):
    """A finished run folder."""
    output = tmp_path_factory.mktemp("runs") / "run"
    small_run(output, small, colors)
    return output
