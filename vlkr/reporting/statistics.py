"""The uncertainty of a difference: a bootstrap over seeds and images, and McNemar's test."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from vlkr.errors import VlkrError


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    differences: Sequence[NDArray[np.integer]],
    *,
    confidence: float = 0.95,
    num_draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a mean difference, with seeds and images both drawn again.

    The two methods share seeds and images, and all seeds share the images; so a draw takes seeds
    with replacement, takes images with replacement, and averages where they cross (the pigeonhole
    bootstrap; Owen, 2007, arXiv 0712.1111). Images whose differences are alike are drawn together,
    as one multinomial count, which is the same distribution and fast for any number of images.

    Args:
        differences: one array a dataset, ``(num_seeds, num_images)``, what one method's answer
            counts (1 right, 0 wrong) less what the other's counts. The mean over datasets, each
            with the same weight, is what the interval is of; the seeds are theirs in common.
        confidence: of the interval.
        num_draws: bootstrap samples.
        seed: of the draws.

    Returns:
        The mean difference and its interval.

    Raises:
        VlkrError: if there is nothing to draw, or the datasets have other numbers of seeds.

    >>> paired_bootstrap([np.ones((3, 50), dtype=int)])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    if not differences or any(d.size == 0 for d in differences):
        raise VlkrError("no differences to draw from, expected seeds x images")
    num_seeds = differences[0].shape[0]
    if any(d.shape[0] != num_seeds for d in differences):
        raise VlkrError("the datasets have other numbers of seeds, expected the same seeds")
    generator = np.random.default_rng(seed)
    seeds = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=num_draws)
    drawn = np.zeros(num_draws)
    for difference in differences:
        patterns, counts = np.unique(difference, axis=1, return_counts=True)
        total = counts.sum()
        images = generator.multinomial(total, counts / total, size=num_draws)
        drawn += ((seeds / num_seeds) @ patterns * (images / total)).sum(1)
    low, high = np.quantile(drawn / len(differences), [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = statistics.mean(float(d.mean()) for d in differences)
    return Interval(mean, float(low), float(high))


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Exact p-value that two classifiers err equally often on the same images.

    Args:
        first: where the first one is right, ``(num_images)``.
        second: where the second one is.

    >>> right = np.array([True] * 8 + [False] * 2)
    >>> mcnemar(right, right), round(mcnemar(right, ~right), 4)
    (1.0, 0.1094)
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def combined_p(values: Sequence[float]) -> float:
    """One p-value of several seeds on the same images: twice the median.

    It holds whatever the dependence between them (Rueger, 1978).

    >>> combined_p([0.01, 0.2, 0.04]), combined_p([0.03]), combined_p([0.7, 0.8])
    (0.08, 0.03, 1.0)
    """
    return values[0] if len(values) == 1 else min(1.0, 2 * statistics.median(values))
