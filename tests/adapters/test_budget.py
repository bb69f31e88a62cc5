"""Parameter counts, equal budgets, and projections in closed form."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_near
from torch import nn

from vlkr.adapters import (
    ADAPTERS,
    KRAdapter,
    adapter_parameters,
    add_adapters,
    count_parameters,
    find_targets,
    match_budget,
    project,
    project_model,
)
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


def test_options_of_both_methods_count(mlp):
    budget = match_budget("lora", mlp, targets=["*"], dropout=0.25, to_options={"rule": "balanced"})
    assert budget.reference_parameters == count(mlp, "kradapter", rule="balanced")
    assert budget.options["dropout"] == 0.25


def test_only_shapes_are_read(tiny_clip):
    before = match_budget("lora", tiny_clip)
    counts = count_parameters("bitfit", tiny_clip), count_parameters("lora", tiny_clip, rank=3)
    on_meta = copy.deepcopy(tiny_clip).to("meta")
    add_adapters(tiny_clip, "kradapter")
    for model in (tiny_clip, on_meta):
        assert match_budget("lora", model) == before
        assert count_parameters("bitfit", model) == counts[0]
        assert count_parameters("lora", model, rank=3) == counts[1]
    with pytest.raises(VlkrError, match="'rnk'"):
        count_parameters("lora", tiny_clip, rnk=3)


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


def norm(matrix):
    return torch.linalg.matrix_norm(matrix.detach().double()).item()


def tail(matrix, rank):
    return np.linalg.norm(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[rank:])


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize(
    ("rule", "num_terms"), [("reference", 1), ("balanced", 1), ("reference", 2)]
)
def test_kradapter_projection_has_the_error_of_the_rows_truncated_svds(shape, rule, num_terms):
    delta = torch.randn(shape)
    adapter = project(delta, "kradapter", rule=rule, num_terms=num_terms, scale=2.0)
    assert isinstance(adapter, KRAdapter)
    rows = delta if shape[0] <= shape[1] else delta.T
    k1 = 4 if rule == "reference" else int(np.sqrt(max(shape)))
    grids = [row.reshape(max(shape) // k1, k1) for row in rows]
    expected = np.linalg.norm([tail(grid, num_terms) for grid in grids])
    assert norm(delta - adapter.delta()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("rule", ["reference", "balanced"])
@pytest.mark.parametrize(
    # Where the columns do not divide the long side the projection is only near the best.
    ("shape", "error"),
    [((12, 12), 1e-4), ((16, 8), 1e-4), ((9, 14), 0.1), ((14, 9), 0.1)],
)
def test_a_kradapter_is_its_own_projection(rule, shape, error):
    made = KRAdapter(shape[1], shape[0], rule=rule)
    for p in made.parameters():
        p.data.normal_()
    projected = project(made.delta().detach(), "kradapter", rule=rule)
    assert norm(projected.delta() - made.delta()) < error * norm(made.delta())


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_projection_has_eckart_and_youngs_error(rank):
    delta = torch.randn(8, 12)
    adapter = project(delta, "lora", rank=rank, alpha=2.0 * rank)
    assert norm(delta - adapter.delta()) == pytest.approx(tail(delta, rank), rel=1e-3)


@pytest.mark.parametrize("num_terms", [1, 2])
def test_krona_projection_has_the_error_of_the_blocks_truncated_svd(num_terms):
    delta = torch.randn(6, 12)
    adapter = project(delta, "krona", scale=0.5, num_terms=num_terms)
    blocks = [delta[3 * i : 3 * i + 3, 4 * j : 4 * j + 4] for i in range(2) for j in range(3)]
    expected = tail(torch.stack([block.flatten() for block in blocks]), num_terms)
    assert norm(delta - adapter.delta()) == pytest.approx(expected, rel=1e-3)


def test_a_projected_model_is_the_base_plus_the_projections():
    base = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    tuned = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    tuned[0].bias.data.copy_(base[0].bias)
    tuned[2].bias.data.copy_(base[2].bias)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    # A LoRA of full rank represents any update of the weights.
    report = project_model(base, tuned.state_dict(), "lora", targets=["*"], rank=8)
    x = torch.randn(5, 12)
    assert_near(base(x), tuned(x), condition=8)
    for projected, i in zip(report, (0, 2), strict=True):
        update = tuned[i].weight - before[f"{i}.weight"]
        assert projected.target.module == str(i)
        assert projected.error < 1e-4
        expected = norm(update) / norm(before[f"{i}.weight"])
        assert projected.delta_norm == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.randn(4), "kradapter"), {}, r"\(4,\)"),
        ((torch.full((4, 4), torch.nan), "kradapter"), {}, "finite"),
        *(((torch.randn(4, 4), name), {}, f"'{name}'") for name in ("vera", "dora", "sinlora")),
        ((torch.randn(4, 4), "kradapter"), {"num_factors": 3}, "num_factors"),
        ((torch.randn(4, 4), "kradapter"), {"scale": 0.0}, "scale"),
        ((torch.randn(4, 4), "lora"), {"alpha": 0.0}, "alpha"),
        ((torch.randn(4, 4), "lora"), {"rnk": 3}, "'rnk'"),
        ((torch.randn(4, 4), "lorra"), {}, "'lorra'"),
    ],
)
def test_what_cannot_be_projected_is_named(arguments, options, message):
    with pytest.raises(VlkrError, match=message):
        project(*arguments, **options)


def test_a_tuned_model_of_a_different_shape_is_named():
    base = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(VlkrError, match=r"0\.weight"):
        project_model(base, {}, "lora", targets=["0"])
    with pytest.raises(VlkrError, match=r"\(8, 11\) at 0\.weight"):
        project_model(base, {"0.weight": torch.zeros(8, 11)}, "lora", targets=["0"])
    assert type(base[0]) is nn.Linear
