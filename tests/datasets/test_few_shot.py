import random
import warnings
from itertools import pairwise

import pytest

from vlkr.datasets import Sample, few_shot_split
from vlkr.errors import VlkrError

NAMES = ("red", "green", "blue")
SAMPLES = [Sample(f"{label}-{i}", b"", label) for label in range(3) for i in range(40)]


def keys(samples):
    return [sample.key for sample in samples]


@pytest.mark.parametrize("shots", [1, 2, 4, 16])
def test_as_many_of_each_class_as_asked(shots):
    split = few_shot_split(SAMPLES, NAMES, shots, seed=1)
    assert [s.label for s in split.train] == [label for label in range(3) for _ in range(shots)]
    val = min(shots, 4)
    assert [s.label for s in split.val] == [label for label in range(3) for _ in range(val)]
    assert len({*keys(split.train), *keys(split.val)}) == 3 * (shots + val)


@pytest.mark.parametrize("order", range(5))
def test_reading_order_does_not_matter(order):
    shuffled = random.Random(order).sample(SAMPLES, len(SAMPLES))
    assert few_shot_split(shuffled, NAMES, 4, 1) == few_shot_split(SAMPLES, NAMES, 4, 1)


def test_a_generator_is_read_once():
    assert few_shot_split(iter(SAMPLES), NAMES, 4, 1) == few_shot_split(SAMPLES, NAMES, 4, 1)


def test_fewer_shots_are_part_of_more():
    splits = [few_shot_split(SAMPLES, NAMES, shots, seed=1) for shots in (1, 2, 4, 8, 16)]
    for fewer, more in pairwise(splits):
        assert set(keys(fewer.train)) < set(keys(more.train))


def test_seeds_choose_differently():
    chosen = [frozenset(keys(few_shot_split(SAMPLES, NAMES, 4, seed).train)) for seed in range(10)]
    assert len(set(chosen)) == 10
    # 4 of 40 a class: each key is expected in one of ten seeds.
    assert len(frozenset.union(*chosen)) > 60


def test_a_class_does_not_depend_on_the_others():
    whole = few_shot_split(SAMPLES, NAMES, 4, 1)
    red = few_shot_split(SAMPLES[:40], NAMES[:1], 4, 1)
    assert keys(red.train) == [k for k in keys(whole.train) if k.startswith("0-")]


def test_exactly_enough_samples_leave_none_to_validate_with():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = few_shot_split(SAMPLES[:4], NAMES[:1], 4, 1)
    assert len(set(keys(split.train))) == 4
    assert split.val == []


def test_short_class_is_repeated_with_a_warning():
    samples = [s for s in SAMPLES if s.label != 1 or s.key in {"1-0", "1-1", "1-2"}]
    with pytest.warns(UserWarning, match=r"'green' has 3 images to train on, repeated to 8 shots"):
        split = few_shot_split(samples, NAMES, 8, 1)
    green = [key for key in keys(split.train) if key.startswith("1-")]
    assert len(green) == 8
    assert sorted(green.count(f"1-{i}") for i in range(3)) == [2, 3, 3]
    assert not [key for key in keys(split.val) if key.startswith("1-")]


@pytest.mark.parametrize("shots", [0, -1])
def test_too_few_shots(shots):
    with pytest.raises(VlkrError, match=f"shots {shots} is too small"):
        few_shot_split(SAMPLES, NAMES, shots, 1)


def test_class_without_samples():
    with pytest.raises(VlkrError, match="class 'blue' is empty"):
        few_shot_split(SAMPLES[:80], NAMES, 4, 1)
