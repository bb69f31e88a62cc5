import pytest
from PIL import Image

from vlkr.evaluation.metrics import ReliabilityBin
from vlkr.evaluation.plots import plot_reliability
from vlkr.evaluation.report import DatasetResult


def result(name):
    bins = [ReliabilityBin(0.4, 0.466667, 6, 0.45, 0.5), ReliabilityBin(0.933333, 1.0, 4, 0.99, 1)]
    return DatasetResult(name, "test", 10, "card (3)", {"ece": 0.1}, reliability=bins)


@pytest.mark.parametrize(("number", "rows"), [(1, 1), (4, 1), (5, 2), (200, 6)])
def test_reliability_diagrams_stand_in_a_grid_of_four(number, rows, tmp_path):
    plot_reliability([result(f"d{i}") for i in range(number)], tmp_path / "r.png")
    with Image.open(tmp_path / "r.png") as figure:
        assert figure.format == "PNG"
        width, height = figure.size
    assert width == round(150 * (2.9 * min(number, 4) + 0.6))
    assert height == round(150 * (2.9 * rows + 0.5))
