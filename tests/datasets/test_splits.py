import random
import tracemalloc
import warnings
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_many_short_classes_are_one_warning():
    samples = [Sample(f"{label}-{i}", b"", label) for label in range(3) for i in range(2 + label)]
    with pytest.warns(UserWarning, match="classes have fewer") as caught:
        split = few_shot_split(samples, NAMES, 4, 1)
    assert [str(w.message) for w in caught] == [
        "2 classes have fewer than 4 images to train on, repeated to 4 shots; fewest: class 'red' "
        "has 2 images"
    ]
    assert len(split.train) == 12


def test_absurd_shots_are_those_of_the_largest_class():
    samples = SAMPLES[:35] + SAMPLES[40:]
    with pytest.warns(UserWarning, match="no class has") as caught:
        split = few_shot_split(samples, NAMES, 10**9, 1)
    assert [str(w.message) for w in caught] == [
        "no class has 1000000000 images to train on: taken as 40 shots, repeated in smaller "
        "classes (class 'red' has 35 images)"
    ]
    assert len(split.train) == 3 * 40
    assert split.val == []


DOMAINS = ("art", "photo")
IN_DOMAINS = [
    Sample(f"{domain}/{label}/{i}", bytes(10), label, domain)
    for domain in DOMAINS
    for label in range(3)
    for i in range(10 + 5 * label)
]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_a_fraction_of_each_class(fraction):
    split = few_shot_split(IN_DOMAINS, NAMES, 16, 1, fraction=fraction)
    for label, size in enumerate((20, 30, 40)):
        wanted = max(1, round(fraction * size))
        assert sum(s.label == label for s in split.train) == wanted
        left = min(wanted, 4, size - wanted)
        assert sum(s.label == label for s in split.val) == left
    assert not {*keys(split.train)} & {*keys(split.val)}


def test_smaller_fractions_are_part_of_larger_ones():
    splits = [few_shot_split(IN_DOMAINS, NAMES, 1, 1, fraction=f / 10) for f in range(1, 11)]
    for fewer, more in pairwise(splits):
        assert set(keys(fewer.train)) < set(keys(more.train))
    assert set(keys(splits[-1].train)) == set(keys(IN_DOMAINS))


def test_shots_of_each_domain():
    split = few_shot_split(IN_DOMAINS, NAMES, 3, 1, per_domain=True)
    cells = [(s.label, s.domain) for s in split.train]
    assert cells == [(label, domain) for label in range(3) for domain in DOMAINS for _ in range(3)]
    assert [(s.label, s.domain) for s in split.val] == cells
    # What is drawn of a domain does not depend on the others.
    photos = [s for s in IN_DOMAINS if s.domain == "photo"]
    alone = few_shot_split(photos, NAMES, 3, 1)
    assert keys(alone.train) == [key for key in keys(split.train) if key.startswith("photo")]


def test_validation_fraction_is_held_out_of_each_class_and_domain():
    split = few_shot_split(IN_DOMAINS, NAMES, 1, 1, fraction=1.0, val_fraction=0.2)
    assert {*keys(split.train), *keys(split.val)} == set(keys(IN_DOMAINS))
    assert len(split.train) + len(split.val) == len(IN_DOMAINS)
    for label, size in enumerate((10, 15, 20)):
        for domain in DOMAINS:
            number = sum((s.label, s.domain) == (label, domain) for s in split.val)
            assert number == round(0.2 * size)
    few = few_shot_split(IN_DOMAINS, NAMES, 2, 1, val_fraction=0.2)
    assert keys(few.val) == keys(split.val)
    assert len(few.train) == 6
    assert set(keys(few.train)) < set(keys(split.train))


def test_a_class_of_one_image_is_trained_on():
    split = few_shot_split([Sample("k", b"", 0, "d")], ["a"], 1, 1, val_fraction=0.9)
    assert (keys(split.train), split.val) == (["k"], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction 0.0 is out of range, expected above 0 and at most 1"),
        ({"fraction": 1.1}, "fraction 1.1 is out of range"),
        ({"val_fraction": 1.0}, "validation fraction 1.0 is out of range, expected 0 or more"),
        ({"val_fraction": -0.1}, "validation fraction -0.1 is out of range"),
    ],
)
def test_fractions_out_of_range(options, message):
    with pytest.raises(VlkrError, match=message):
        few_shot_split(SAMPLES, NAMES, 4, 1, **options)


def test_a_key_that_occurs_twice_is_told():
    with pytest.raises(VlkrError, match="key '0-3' occurs twice in the training split"):
        few_shot_split([*SAMPLES, SAMPLES[3]], NAMES, 40, 1)


@pytest.mark.parametrize("options", [{}, {"fraction": 0.3}, {"val_fraction": 0.2}])
def test_images_beyond_the_bound_are_let_go(options):
    whole = few_shot_split(IN_DOMAINS, NAMES, 4, 1, **options)
    bare = few_shot_split(IN_DOMAINS, NAMES, 4, 1, **options, max_bytes=100)
    assert whole.positions is None
    assert all(sample.image for sample in whole.train)
    assert [(s.key, s.label, s.domain) for s in bare.train + bare.val] == [
        (s.key, s.label, s.domain) for s in whole.train + whole.val
    ]
    assert not any(sample.image for sample in bare.train + bare.val)
    order = keys(IN_DOMAINS)
    assert bare.positions == {s.key: order.index(s.key) for s in whole.train + whole.val}


def test_memory_is_bounded_by_what_is_kept():
    def samples():
        for i in range(20_000):
            yield Sample(f"k{i}", bytes(10_000), i % 2)

    tracemalloc.start()
    try:
        split = few_shot_split(samples(), ["a", "b"], 8, 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(split.train) == 16
    assert peak < 2e6  # 24 images of 200 MB


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    shots=st.integers(1, 5),
    options=st.fixed_dictionaries(
        {
            "fraction": st.none() | st.floats(0.05, 1),
            "val_fraction": st.none() | st.floats(0, 0.9),
            "per_domain": st.booleans(),
        }
    ),
    order=st.randoms(use_true_random=False),
)
def test_any_order_gives_the_same_disjoint_parts(sizes, shots, options, order):
    samples = [
        Sample(f"{label}/{i}", b"x", label, DOMAINS[i % 2])
        for label, size in enumerate(sizes)
        for i in range(size)
    ]
    names = [str(label) for label in range(len(sizes))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split = few_shot_split(samples, names, shots, 3, **options)
        shuffled = list(samples)
        order.shuffle(shuffled)
        again = few_shot_split(shuffled, names, shots, 3, **options)
    assert again == split
    assert not {*keys(split.train)} & {*keys(split.val)}
    assert len(set(keys(split.val))) == len(split.val)
    assert {s.label for s in split.train} == set(range(len(sizes)))
