"""Against scipy, closed forms and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom, bootstrap, norm

from vlkr.errors import VlkrError
from vlkr.reporting.statistics import combined_p, mcnemar, paired_bootstrap


def differences(seeds, images, generator, shares=(0.15, 0.65, 0.2)):
    return generator.choice([-1, 0, 1], p=shares, size=(seeds, images))


def test_one_seed_is_scipys_percentile_bootstrap():
    found = differences(1, 300, np.random.default_rng(0))
    own = paired_bootstrap([found], num_draws=20_000)
    theirs = bootstrap(
        (found[0],), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    assert own.mean == pytest.approx(found.mean())
    assert own.low == pytest.approx(theirs.low, abs=0.004)
    assert own.high == pytest.approx(theirs.high, abs=0.004)


def test_one_image_draws_seeds_alone():
    found = np.array([[1], [0], [0], [1], [-1], [0], [1], [1]])
    own = paired_bootstrap([found], num_draws=20_000, confidence=0.8)
    theirs = bootstrap(
        (found[:, 0],),
        np.mean,
        method="percentile",
        confidence_level=0.8,
        n_resamples=20_000,
        rng=1,
    ).confidence_interval
    assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high), abs=0.13)


def test_draws_are_those_of_resampled_rows_and_columns():
    generator = np.random.default_rng(3)
    found = differences(4, 60, generator)
    rows = generator.integers(4, size=(4000, 4))
    columns = generator.integers(60, size=(4000, 60))
    drawn = [found[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    own = paired_bootstrap([found], num_draws=20_000)
    assert (own.low, own.high) == pytest.approx((low, high), abs=0.015)


def test_mean_over_datasets_draws_their_images_independently():
    """Of two independent means the variance halves, while the seeds stay in common."""
    generator = np.random.default_rng(4)
    first, second = (differences(1, 2000, generator) for _ in range(2))
    alone = paired_bootstrap([first])
    both = paired_bootstrap([first, second])
    assert both.mean == pytest.approx((first.mean() + second.mean()) / 2)
    assert (both.high - both.low) / (alone.high - alone.low) == pytest.approx(
        math.sqrt(0.5), abs=0.05
    )


def test_is_normal_for_many_images():
    found = differences(1, 50_000, np.random.default_rng(5))
    own = paired_bootstrap([found])
    half = norm.ppf(0.975) * found.std() / math.sqrt(found.size)
    assert (own.low, own.high) == pytest.approx(
        (found.mean() - half, found.mean() + half), abs=0.0005
    )


def test_is_a_function_of_its_seed():
    found = differences(3, 100, np.random.default_rng(6))
    assert paired_bootstrap([found], seed=1) == paired_bootstrap([found], seed=1)
    assert paired_bootstrap([found], seed=1) != paired_bootstrap([found], seed=2)


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.3), (5, 0.3), (10, 1.0)])
def test_covers_the_true_difference(seeds, spread):
    """Images of unlike difficulty, seeds of unlike luck: 200 experiments with a known truth."""
    generator = np.random.default_rng(7)

    def chances(mean, easiness, luck):
        return 1 / (1 + np.exp(-(mean + easiness + luck)))

    many = generator.normal(1, 2, 1_000_000)
    first, second = (
        chances(mean, many, generator.normal(0, spread, many.shape)).mean() for mean in (0.3, 0.0)
    )
    truth = first - second
    hits = 0
    for trial in range(200):
        easiness = generator.normal(1, 2, 200)
        first, second = (
            generator.random((seeds, 200))
            < chances(mean, easiness, generator.normal(0, spread, (seeds, 1)))
            for mean in (0.3, 0.0)
        )
        found = first.astype(int) - second
        interval = paired_bootstrap([found], num_draws=500, seed=trial)
        hits += interval.low <= truth <= interval.high
    assert 0.88 <= hits / 200 <= 1.0


@given(arrays(np.int8, (3, 20), elements=st.integers(-1, 1)))
def test_interval_lies_around_its_mean(found):
    own = paired_bootstrap([found], num_draws=200)
    assert -1 <= own.low <= own.high <= 1
    opposite = paired_bootstrap([-found], num_draws=200)
    assert opposite.mean == pytest.approx(-own.mean)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "no differences to draw from"),
        ([np.zeros((2, 0), int)], "no differences to draw from"),
        ([np.zeros((2, 3), int), np.zeros((3, 3), int)], "other numbers of seeds"),
    ],
)
def test_refuses(found, message):
    with pytest.raises(VlkrError, match=message):
        paired_bootstrap(found)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20), st.integers(0, 20))
def test_mcnemar_is_the_exact_binomial(only_first, only_second, both, neither):
    first = np.repeat([True, False, True, False], [only_first, only_second, both, neither])
    second = np.repeat([False, True, True, False], [only_first, only_second, both, neither])
    number, fewer = only_first + only_second, min(only_first, only_second)
    expected = min(1.0, 2 * binom.cdf(fewer, number, 0.5)) if number else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)
    assert mcnemar(second, first) == pytest.approx(expected)


def test_combined_p_is_a_p_value():
    """Under the null and full dependence, where a plain median would be too small."""
    generator = np.random.default_rng(8)
    uniform = generator.random(20_000)
    for values in (np.repeat(uniform[:, None], 3, axis=1), generator.random((20_000, 3))):
        combined = np.array([combined_p(list(row)) for row in values])
        assert (combined <= 0.05).mean() <= 0.055
