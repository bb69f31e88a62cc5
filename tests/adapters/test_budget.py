import pytest
from torch import nn

from vlkr.adapters import ADAPTERS, adapter_parameters, add_adapters, find_targets, match_budget
from vlkr.errors import VlkrError

SIZED = [name for name, cls in ADAPTERS.items() if cls.budget_option is not None]


def count(model, method, **options):
    cls = ADAPTERS[method]
    return sum(
        cls.num_parameters(t.in_features, t.out_features, **options)
        for t in find_targets(model, ["*"])
    )


@pytest.fixture
def mlp():
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 128), nn.Linear(128, 32))


def test_lora_rank_is_the_nearest_by_closed_form(tiny_clip):
    # q, k, v, out of 32x32 and fc1, fc2 of 32x128 in five blocks.
    kradapter = 5 * (4 * 32 * (5 + 7) + 2 * 32 * (5 + 26))
    per_rank = 5 * (4 * (32 + 32) + 2 * (32 + 128))
    nearest = min(range(1, 100), key=lambda rank: abs(rank * per_rank - kradapter))
    budget = match_budget("lora", tiny_clip, to="kradapter")
    assert budget.options == {"rank": nearest}
    assert budget.parameters == nearest * per_rank
    assert budget.reference_parameters == kradapter
    assert budget.difference == pytest.approx(nearest * per_rank / kradapter - 1)


def test_rank_28_meets_kradapter_at_width_768():
    model = nn.Sequential(nn.Linear(768, 768))
    budget = match_budget("lora", model, targets=["0"])
    assert budget.options == {"rank": 28}
    assert budget.difference == 0


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("to", ["kradapter", "lora", "bitfit"])
def test_size_is_the_nearest_by_brute_force(name, to, mlp):
    option = ADAPTERS[name].budget_option
    budget = match_budget(name, mlp, to=to, targets=["*"])
    goal = count(mlp, to)
    nearest = min(abs(count(mlp, name, **{option: size}) - goal) for size in range(1, 33))
    found = count(mlp, name, **budget.options)
    assert abs(found - goal) <= nearest
    assert (budget.parameters, budget.reference_parameters) == (found, goal)


@pytest.mark.parametrize("name", SIZED)
def test_counts_are_those_of_the_adapters_put_on(name, tiny_clip):
    options = {"towers": ("visual",), "blocks": [0], "targets": ("q", "fc2")}
    budget = match_budget(name, tiny_clip, to="kradapter", **options)
    add_adapters(tiny_clip, name, **options, **budget.options)
    assert sum(p.numel() for p in adapter_parameters(tiny_clip)) == budget.parameters


def test_other_options_are_kept(tiny_clip):
    budget = match_budget("lora", tiny_clip, dropout=0.25)
    assert budget.options == {**match_budget("lora", tiny_clip).options, "dropout": 0.25}


def test_reference_options_count(mlp):
    balanced = match_budget("lora", mlp, targets=["*"], to_options={"rule": "balanced"})
    assert balanced.reference_parameters == count(mlp, "kradapter", rule="balanced")


def test_a_model_with_adapters_gives_the_same_answer(tiny_clip):
    before = match_budget("lora", tiny_clip)
    add_adapters(tiny_clip, "kradapter")
    assert match_budget("lora", tiny_clip) == before


def test_a_goal_below_the_smallest_size_takes_the_smallest(tiny_clip):
    assert match_budget("lora", tiny_clip, to="bitfit").options == {"rank": 1}


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - set(SIZED)))
def test_a_method_without_size_is_named(name, tiny_clip):
    with pytest.raises(VlkrError, match=f"'{name}' has no size"):
        match_budget(name, tiny_clip)


@pytest.mark.parametrize(
    ("arguments", "keywords", "named"),
    [
        (("lorra",), {}, "'lorra'.*'lora'"),
        (("lora",), {"to": "kradaptor"}, "'kradaptor'.*'kradapter'"),
        (("lora",), {"droput": 0.1}, "'droput'"),
        (("lora",), {"to_options": {"rul": 1}}, "'rul'"),
        (("lora",), {"targets": ["nowhere"]}, "'nowhere'"),
        (("lora",), {"blocks": [9]}, "block 9"),
    ],
)
def test_mistakes_are_named(arguments, keywords, named, tiny_clip):
    method, *rest = arguments
    with pytest.raises(VlkrError, match=named):
        match_budget(method, tiny_clip, *rest, **keywords)


def test_a_size_that_is_given_is_not_chosen(tiny_clip):
    with pytest.raises(VlkrError, match="'lora' has its own rank 8, and the budget of 'kradapter'"):
        match_budget("lora", tiny_clip, rank=8)
