import pytest
import torch

from vlkr.approximation.authors import AUTHORS_METHODS, authors_method
from vlkr.approximation.distances import (
    composed_distance,
    squared_distance,
    stacked_deltas,
    stacked_factors,
)
from vlkr.approximation.methods import sized_method

METHODS = [
    "lora:rank=3",
    "lora:rank=2,alpha=5.0",
    "sinlora:rank=3",
    "sinlora:rank=2,gain=null",
    "kradapter",
    "kradapter:scale=2.0,num_terms=2",
    "kradapter:rule=balanced,num_terms=2",
    "kradapter:num_factors=3",
    "randlora:rank=2",
    "krona:num_terms=2",
    "vera:rank=5",
    "full",
]
SHAPES = [(12, 18), (18, 12), (16, 16), (7, 30)]


def adapters_of(method, count):
    """Equal adapters in fp64 with random factors, one a seed."""
    made = [method.make(seed).double() for seed in range(1, count + 1)]
    for adapter in made:
        for p in adapter.parameters():
            p.data.normal_()
    return made


def expected_values(adapters, targets, weights):
    """Distances and the gradient of their weighted roots, one adapter after the other."""
    squares, gradients = [], []
    for adapter, target, weight in zip(adapters, targets, weights, strict=True):
        square = ((adapter.delta() - target) ** 2).sum()
        squares.append(square.detach())
        gradients.append(torch.autograd.grad(weight * square.sqrt(), list(adapter.parameters())))
    return torch.stack(squares), [torch.stack(g) for g in zip(*gradients, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", [*METHODS, *AUTHORS_METHODS[:4]])
def test_distance_and_gradient_are_those_of_the_composed_change(name, count, shape):
    size = shape[1], shape[0]
    method = authors_method(name, *size) if name in AUTHORS_METHODS else sized_method(name, *size)
    adapters = adapters_of(method, count)
    targets = torch.randn(count, *shape, dtype=torch.float64)
    weights = torch.arange(1.0, count + 1, dtype=torch.float64)
    squares, gradients = expected_values(adapters, targets, weights)
    factors = stacked_factors(adapters)
    for make in (squared_distance, composed_distance):
        distance = make(adapters, targets)
        for _ in range(2):  # a second call must not be disturbed by the first one's memory
            found = distance(factors)
            torch.testing.assert_close(found, squares)
            found_gradients = torch.autograd.grad(
                (weights * found.sqrt()).sum(), list(factors.values())
            )
            for a, b in zip(found_gradients, gradients, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_stacked_deltas_are_each_adapters_own(name, count):
    adapters = adapters_of(sized_method(name, 10, 14), count)
    with torch.no_grad():
        found = stacked_deltas(adapters, stacked_factors(adapters))
        for delta, adapter in zip(found, adapters, strict=True):
            torch.testing.assert_close(delta, adapter.delta())
