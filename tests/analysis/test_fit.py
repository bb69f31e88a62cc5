import pytest
import torch

from vlkr.analysis.fit import (
    Recipe,
    composed_distance,
    fit,
    squared_distance,
    stacked_deltas,
    stacked_factors,
)
from vlkr.analysis.methods import AUTHORS_METHODS, authors_method, optimum, sized_method

METHODS = [
    "lora:rank=2,alpha=5.0",
    "sinlora:rank=2,gain=null",
    "kradapter:scale=2.0,num_terms=2",
    "kradapter:rule=balanced,num_terms=2",
    "kradapter:num_factors=3",
    "randlora:rank=2",
    "krona:num_terms=2",
    "vera:rank=5",
    "dora:rank=2",
    "full",
]
SHAPES = [(12, 18), (18, 12), (7, 30)]
TRAINED = ["lora", "sinlora", "kradapter", "randlora", "krona", "vera:rank=4", "dora", "full"]


def sized(name, shape):
    size = shape[1], shape[0]
    return authors_method(name, *size) if name in AUTHORS_METHODS else sized_method(name, *size)


def base_weights(method, seeds):
    """fp64 base weights, None for a method that needs none."""
    if method.base_weight is None:
        return None
    return torch.stack([method.base_weight(seed) for seed in seeds]).double()


def random_adapters(method, seeds):
    """Equal adapters in fp64 with random factors, one per seed."""
    adapters = [method.make(seed).double() for seed in seeds]
    for adapter in adapters:
        for p in adapter.parameters():
            p.data.normal_()
    return adapters


def plain_values(adapters, targets, bases, factors):
    """Distances and the gradient of their weighted roots, one adapter after another."""
    squares, gradients = [], []
    for adapter, target, base, factor in zip(adapters, targets, bases, factors, strict=True):
        square = ((adapter.delta(base) - target) ** 2).sum()
        squares.append(square.detach())
        gradients.append(torch.autograd.grad(factor * square.sqrt(), list(adapter.parameters())))
    return torch.stack(squares), [torch.stack(g) for g in zip(*gradients, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", [*METHODS, *AUTHORS_METHODS[:4]])
def test_distance_and_gradient_are_those_of_the_composed_update(name, count, shape):
    method, seeds = sized(name, shape), range(1, count + 1)
    adapters, weights = random_adapters(method, seeds), base_weights(method, seeds)
    targets = torch.randn(count, *shape, dtype=torch.float64)
    bases = [None] * count if weights is None else list(weights)
    scales = torch.arange(1.0, count + 1, dtype=torch.float64)
    squares, gradients = plain_values(adapters, targets, bases, scales)
    factors = stacked_factors(adapters)
    for make in (squared_distance, composed_distance):
        distance = make(adapters, targets, weights)
        for _ in range(2):  # a second call must not be disturbed by the first one's memory
            values = distance(factors)
            torch.testing.assert_close(values, squares)
            own = torch.autograd.grad((scales * values.sqrt()).sum(), list(factors.values()))
            for a, b in zip(own, gradients, strict=True):
                torch.testing.assert_close(a, b)
    with torch.no_grad():
        deltas = stacked_deltas(adapters, weights)(factors)
        for delta, adapter, base in zip(deltas, adapters, bases, strict=True):
            torch.testing.assert_close(delta, adapter.delta(base))


@pytest.mark.parametrize("name", METHODS[:4] + METHODS[5:8])
def test_an_expanded_distance_cannot_be_differentiated_twice(name):
    adapters = random_adapters(sized(name, (12, 18)), [1])
    factors = stacked_factors(adapters)
    square = squared_distance(adapters, torch.randn(1, 12, 18, dtype=torch.float64))(factors)
    first = torch.autograd.grad(square.square().sum(), list(factors.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in first).backward()


def plain_loop(adapter, target, base, recipe):
    """The recipe as anyone would write it, one adapter at a time."""
    optimizer = torch.optim.AdamW(
        adapter.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=False
    )
    for _ in range(recipe.iterations):
        delta = adapter.delta(base)
        loss = torch.linalg.matrix_norm(delta - target)
        optimizer.zero_grad()
        loss.backward()
        kept = delta.detach().clone()
        optimizer.step()
    return kept


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_of_a_plain_loop_for_each_seed(name):
    method, seeds = sized_method(name, 12, 16), range(3)
    recipe = Recipe(iterations=25, lr=0.05, weight_decay=0.02)
    targets, weights = torch.randn(3, 16, 12, dtype=torch.float64), base_weights(method, seeds)
    expected = [
        plain_loop(
            method.make(seed).double(),
            targets[seed],
            None if weights is None else weights[seed],
            recipe,
        )
        for seed in seeds
    ]
    updates = fit([method.make(seed).double() for seed in seeds], targets, recipe, weights)
    # 25 steps amplify the rounding of the expanded squares.
    torch.testing.assert_close(updates, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_training_leaves_the_adapters_as_they_were():
    adapter = sized_method("lora", 12, 16).make(1)
    before = {name: p.clone() for name, p in adapter.state_dict().items()}
    fit([adapter], torch.randn(1, 16, 12), Recipe(5))
    assert all(torch.equal(p, before[name]) for name, p in adapter.state_dict().items())


@pytest.mark.parametrize("shape", [(24, 24), (36, 20), (20, 36)])
@pytest.mark.parametrize(
    "name", ["lora", "kradapter", "kradapter:rule=balanced", "kradapter:num_terms=2", "krona"]
)
def test_closed_forms_are_not_worse_than_training(name, shape):
    method = sized_method(name, shape[1], shape[0])
    target = torch.randn(shape)
    best = optimum(method.make(1), target)
    trained = fit([method.make(1)], target.unsqueeze(0), Recipe(600, lr=0.02))[0]
    norm = torch.linalg.matrix_norm
    assert norm(best - target) <= norm(trained - target) * (1 + 1e-5)
    # and training comes close, so that the bound says something
    assert norm(trained - target) <= 1.03 * norm(best - target)


def test_a_target_within_reach_is_met():
    method = sized_method("kradapter", 20, 16)
    source = method.make(1)
    torch.nn.init.normal_(source.u)
    target = source.delta().detach()
    trained = fit([method.make(2)], target.unsqueeze(0), Recipe(2000, lr=0.02, weight_decay=0.0))[0]
    assert torch.linalg.matrix_norm(trained - target) < 0.1 * torch.linalg.matrix_norm(target)
    assert trained.isfinite().all()
