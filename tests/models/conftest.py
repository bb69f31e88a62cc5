import pytest
from helpers import write_clip


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Name of a small CLIP with random weights."""
    return write_clip(tmp_path_factory.mktemp("models") / "clip")
