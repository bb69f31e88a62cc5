import pytest
from helpers import COLORS, color_image, write_images

from vlkr.config import OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLKR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    """A dataset to adapt to; beside it, ``more`` images of its classes, and ``two`` classes."""
    root = tmp_path_factory.mktemp("data")
    write_images(root / "more", per_class=16, names=list(COLORS)[::-1])
    write_images(root / "two", per_class=8, names=["red", "blue"])
    return write_images(root / "colors")


@pytest.fixture(scope="session")
def others(colors):
    """Datasets under domain shift."""
    return [str(colors.parent / name) for name in ("more", "two")]


@pytest.fixture(scope="session")
def domains(tmp_path_factory):
    """A tree of three domains."""
    root = tmp_path_factory.mktemp("domains") / "tree"
    for d, domain in enumerate(("one", "three", "two")):
        for c, name in enumerate(COLORS):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(10):
                (folder / f"{i}.png").write_bytes(color_image(name, 1000 * d + 100 * c + i))
    return root


@pytest.fixture(scope="session")
def options(small, colors):
    """A grid whose cells take a moment: few steps of a small model."""
    return {
        "model": small,
        "data": DataConfig(root=colors, shots=2, batch_size=8, min_steps_per_epoch=2),
        "optimizer": OptimizerConfig(lr=1e-2),
        "trainer": TrainerConfig(epochs=1, accelerator="cpu", progress=False),
        "seeds": [1, 2],
    }
