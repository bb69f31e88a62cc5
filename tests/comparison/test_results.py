"""Choices, pairs and differences of made-up cells, by hand."""

import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.stats import binom

from vlkr.comparison.plan import Candidate, Entry, Plan, Reading
from vlkr.comparison.results import (
    CellFolder,
    CellResult,
    GridResults,
    SelectedRuns,
    select_runs,
)
from vlkr.comparison.tables import (
    choice_table,
    compare_to_reference,
    mean_difference,
    mean_over,
    mean_row,
    method_table,
    p_value,
    paired_by_seed,
)
from vlkr.errors import VlkrError

NUM_IMAGES = 40
PLACE = {"dataset": "a"}


def result(name, seed=None, validation=None, folder=None, keys="same", **sets):
    """A cell; each set is the number of its first images that are correct, or a mask."""
    tensors, records = {}, []
    for set_name, correct in sets.items():
        mask = np.arange(NUM_IMAGES) < correct if isinstance(correct, int) else correct
        tensors[f"{set_name}.labels"] = np.full(NUM_IMAGES, 3, np.int32)
        tensors[f"{set_name}.predicted"] = np.where(mask, 3, 5).astype(np.int32)
        tensors[f"{set_name}.confidence"] = np.ones(NUM_IMAGES, np.float32)
        records.append({"dataset": set_name, "metrics": {"acc1": float(np.mean(mask))}})
    if folder is not None:
        (folder / name).mkdir()
        metadata = {"keys": json.dumps(dict.fromkeys(sets, keys))}
        save_file(tensors, folder / name / "predictions.safetensors", metadata)
    cell = SimpleNamespace(id=name, seed=seed, kind="adapter")
    record = {"val_acc1": validation, "results": records, "parameters": 1}
    return CellResult(cell, CellFolder(folder / name if folder else None), record)


def runs(method, results, sets, place=PLACE):
    return SelectedRuns(Entry(method, place, (), sets), Candidate({}, ()), results)


def grid(*selected):
    plan = Plan("compare", (), (), "lora", {})
    return GridResults(plan, list(selected), {}, [], {})


@pytest.mark.parametrize(
    ("validation", "chosen"),
    [
        ([(0.5, 0.7), (0.6, 0.8)], 1),
        ([(0.6, 0.8), (0.5, 0.7)], 0),
        ([(0.9, 0.1), (0.6, 0.6), (0.2, 0.2)], 1),  # by the mean, not the best seed
        ([(0.5, 0.5), (0.1, 0.6), (0.5, 0.5)], 0),  # the first of equal ones
        ([(0.4, 0.4), (0.5, 0.5), (0.5, 0.5)], 1),
        ([(0.5, 0.5), (0.99,)], 0),  # a setting without all its seeds does not count
        ([(0.2,), (0.7,), ()], 1),  # unless none has all of them
        ([(0.7, 0.7), (0.9, None)], 0),
        ([(None, None), (0.1, 0.1)], 1),
        ([(None, None), (None, None)], 0),
        ([(), ()], None),
    ],
)
def test_settings_are_chosen_by_mean_validation_accuracy(validation, chosen):
    candidates, cells = [], {}
    for i, values in enumerate(validation):
        ids = (f"{i} seed1", f"{i} seed2")
        candidates.append(Candidate({"lr": i}, ids, tuple(Reading(name) for name in ids)))
        for seed, (name, value) in enumerate(zip(ids, values, strict=False)):
            cells[name] = result(name, seed + 1, value)
    selected = select_runs(Entry("lora", PLACE, tuple(candidates), ("a",)), cells)
    assert selected.chosen is (None if chosen is None else candidates[chosen])
    own = [name for name in cells if chosen is not None and name.startswith(f"{chosen} ")]
    assert [r.cell.id for r in selected.results] == own


def test_domains_count_the_same_in_a_choice():
    record = {"dataset": "(validation)", "metrics": {"acc1": 0.9, "mean_domain_acc1": 0.4}}
    cell = CellResult(SimpleNamespace(seed=1), CellFolder(None), {"results": [record]})
    candidate = Candidate({}, ("x",), (Reading("x", "(validation)"),))
    assert select_runs(Entry("lora", PLACE, (candidate,), ()), {"x": cell}).scores == [0.4]


def test_results_pair_by_seed_in_whatever_order():
    ours = runs("full", [result(f"f{s}", s) for s in (1, 2, 3)], ("a",))
    theirs = runs("lora", [result(f"l{s}", s) for s in (3, 4, 1)], ("a",))
    without = runs("zero-shot", [result("z", None)], ("a",))

    def names(first, second):
        return {(a.cell.id, b.cell.id) for a, b in paired_by_seed(first, second)}

    assert names(ours, theirs) == {("f1", "l1"), ("f3", "l3")}
    assert names(without, theirs) == {("z", "l3"), ("z", "l4"), ("z", "l1")}
    assert names(ours, without) == {("f1", "z"), ("f2", "z"), ("f3", "z")}
    assert names(without, without) == {("z", "z")}


def test_a_better_method_has_a_positive_difference_and_twice_the_median_p(tmp_path):
    """Our first images are correct beyond theirs, so that McNemar counts one side alone."""
    ours = {1: (30, 20), 2: (32, 24), 3: (34, 30)}
    theirs = {3: (20, 22), 1: (20, 24), 2: (20, 20)}
    results = grid(
        *(
            runs(
                method,
                [
                    result(f"{method}{seed}", seed, folder=tmp_path, a=a, b=b, c=b)
                    for seed, (a, b) in numbers.items()
                ],
                ("a", "b", "c"),
            )
            for method, numbers in (("full", ours), ("lora", theirs))
        )
    )
    found = compare_to_reference(results, [PLACE], lambda place: ("a", "b", "c"))
    by_set = {difference.set: difference for difference in found}
    assert [d.method for d in found] == ["full"] * 4
    assert {d.seeds for d in found} == {3}
    assert by_set["a"].interval.mean == pytest.approx(statistics.mean((10, 12, 14)) / NUM_IMAGES)
    assert by_set["a"].p == pytest.approx(2 * 2 * binom.cdf(0, 12, 0.5))
    # By seed: -4, 4 and 8 images, of which each is McNemar's 2 x 0.5^n.
    assert by_set["b"].interval.mean == pytest.approx(8 / 3 / NUM_IMAGES)
    assert by_set["b"].p == pytest.approx(min(1, 2 * 2 * 0.5**4))
    shifts = by_set["mean of 2 shifts"]
    assert (shifts.p, shifts.interval.mean) == (None, pytest.approx(8 / 3 / NUM_IMAGES))
    assert shifts.interval.low <= shifts.interval.mean <= shifts.interval.high


def test_images_must_be_the_same(tmp_path):
    first, second = (
        runs(method, [result(method, 1, folder=tmp_path, keys=method, a=5)], ("a",))
        for method in ("full", "lora")
    )
    with pytest.raises(VlkrError, match="on different images of 'a'; compute them again"):
        compare_to_reference(grid(first, second), [PLACE], lambda place: ("a",))


def test_means_over_places_are_seed_by_seed(tmp_path):
    places = [{"domain": name} for name in ("a", "b")]
    a, b = (
        [result(f"{name}{s}", s, folder=tmp_path, **{name: n}) for s, n in numbers.items()]
        for name, numbers in (("a", {1: 10, 2: 30}), ("b", {2: 20, 3: 40, 1: 40}))
    )
    reference = [
        result(f"r{name}{s}", s, folder=tmp_path, **{name: 8})
        for name in ("a", "b")
        for s in (1, 2, 3)
    ]
    results = grid(
        runs("full", a, ("a",), places[0]),
        runs("full", b, ("b",), places[1]),
        runs("lora", reference[:2], ("a",), places[0]),
        runs("lora", reference[3:], ("b",), places[1]),
    )
    assert mean_over(results, "full", places, SelectedRuns.first_set) == [50 / 80, 50 / 80]
    assert mean_over(results, "full", [*places, {"domain": "c"}], SelectedRuns.first_set) == []
    assert mean_row(results, "mean", places, SelectedRuns.first_set)[1] == "62.5 ± 0.0"
    table = method_table(results, "title", "top-1 %", [("a", places[0], SelectedRuns.first_set)])
    assert table.header == ("top-1 %", "full", "lora")
    assert [list(row) for row in table.rows] == [
        ["trained parameters", "1", "1"],
        ["a", "50.0 ± 35.4", "20.0 ± 0.0"],
    ]
    # b has a third seed, so that the places share no number of seeds.
    assert mean_difference(results, "full", places, {"domain": "all"}, "mean") is None
    results.selected[1].results.pop(1)
    results.selected[3].results.pop(2)
    difference = mean_difference(results, "full", places, {"domain": "all"}, "mean")
    expected = ((10 + 30 - 16) + (20 + 40 - 16)) / 4 / NUM_IMAGES
    assert difference.interval.mean == pytest.approx(expected)
    assert (difference.seeds, difference.p) == (2, None)
    assert mean_difference(results, "lora", places, {"domain": "all"}, "mean") is None


def test_a_choice_at_an_end_of_its_list_is_reported():
    candidates = tuple(Candidate({"lr": lr, "epochs": 2}, ()) for lr in (0.1, 0.2, 0.3))

    def table(chosen):
        entry = Entry("lora", PLACE, candidates, ("a",))
        return choice_table(grid(SelectedRuns(entry, candidates[chosen], [], [0.5, None, 0.25])))

    middle, end = table(1), table(2)
    assert middle.header == ("method", "dataset", *(f"lr 0.{i} epochs 2" for i in (1, 2, 3)))
    assert middle.rows == (("lora", "a", "50.0", "? *", "25.0"),)
    assert middle.note.endswith("* the chosen setting")
    assert end.rows == (("lora", "a", "50.0", "?", "25.0 *"),)
    assert end.note.endswith("beyond which others may do better: lora")


@pytest.mark.parametrize(
    ("p", "text"), [(0.5, "0.500"), (0.001, "0.001"), (0.0009, "<0.001"), (None, "")]
)
def test_p_values(p, text):
    assert p_value(p) == text
