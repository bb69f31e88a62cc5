"""The drill's count: every case is tried, and survives or is lost."""

from collections import Counter
from contextlib import contextmanager

import pytest
from faults.processes import Server
from hypothesis import HealthCheck, Phase, settings

from vlkr.datasets import BadSample
from vlkr.errors import VlkrError

_CASES, _FIGURES = "drill", "drill's figures"
_totals: Counter = Counter()
_figures: list[str] = []


def pytest_addoption(parser):
    parser.addoption(
        "--drill",
        choices=["short", "long"],
        default="short",
        help="how many cases the fault drill tries",
    )


def _is_long(config):
    return config.getoption("--drill", "short") == "long"


def pytest_configure(config):
    settings.register_profile(
        "drill",
        deadline=10_000,  # ms; a reader that hangs is a failure
        max_examples=1000 if _is_long(config) else 50,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # a failing case is told at once
        report_multiple_bugs=False,
        database=None,
    )


@pytest.fixture(scope="session")
def is_long(request):
    return _is_long(request.config)


class Case:
    """Counts the cases of one test."""

    def __init__(self):
        self.counts = Counter()
        self.figures = []

    @contextmanager
    def __call__(self, category):
        """One case: it survives if the block ends, and is lost if that raises."""
        self.counts[category, "tried"] += 1
        try:
            yield
        except BaseException:
            self.counts[category, "lost"] += 1
            raise
        self.counts[category, "survived"] += 1

    def figure(self, text):
        """Tells what was measured, below the table."""
        self.figures.append(text)


@pytest.fixture
def case(request):
    """``with case("category"):`` around each thing that is tried."""
    counted = Case()
    yield counted
    found = [[*key, number] for key, number in counted.counts.items()]
    request.node.user_properties += [(_CASES, found), (_FIGURES, counted.figures)]
    assert found, "this test of the drill has counted no case"


@pytest.fixture
def read():
    """Calls a reader, and gives None if it refuses.

    Each test compares with another reader what is read and what is refused, and at least one input
    in 20 must be read.
    """
    outcomes = Counter()

    def attempt(reader, *arguments):
        try:
            value = reader(*arguments)
        except VlkrError:
            value = None
        value = None if isinstance(value, BadSample) else value
        outcomes["refused" if value is None else "read"] += 1
        return value

    yield attempt
    assert outcomes["read"] >= 0.05 * outcomes.total() > 0


# The properties travel with the report, from xdist's workers too.
def pytest_runtest_logreport(report):
    if report.when == "teardown":
        for name, found in report.user_properties:
            if name == _CASES:
                for category, what, number in found:
                    _totals[category, what] += number
            elif name == _FIGURES:
                _figures.extend(found)


def pytest_terminal_summary(terminalreporter):
    categories = sorted({category for category, _ in _totals})
    if not categories:
        return
    rows = [
        [name, *(_totals[name, what] for what in ("tried", "survived", "lost"))]
        for name in categories
    ]
    rows.append(["all", *(sum(row[i] for row in rows) for i in (1, 2, 3))])
    terminalreporter.section("fault drill")
    terminalreporter.write_line("| category | tried | survived | lost |")
    terminalreporter.write_line("|---|---:|---:|---:|")
    for row in rows:
        terminalreporter.write_line("| {} | {} | {} | {} |".format(*row))
    for text in _figures:
        terminalreporter.write_line(f"- {text}")


@pytest.fixture(scope="session")
def server():
    """Starts commands as processes that are forked from one with everything imported."""
    return Server()
