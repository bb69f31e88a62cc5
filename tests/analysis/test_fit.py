import pytest
import torch

from vlkr.approximation.fit import Recipe, fit
from vlkr.approximation.methods import optimum, sized_method

TRAINED = ["lora", "sinlora", "kradapter", "randlora", "krona", "vera:rank=4", "full"]


def plain_loop(adapter, target, recipe):
    """The recipe as anyone would write it, one adapter at a time."""
    optimizer = torch.optim.AdamW(
        adapter.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=False
    )
    for _ in range(recipe.iterations):
        delta = adapter.delta()
        loss = torch.linalg.matrix_norm(delta - target)
        optimizer.zero_grad()
        loss.backward()
        kept = delta.detach().clone()
        optimizer.step()
    return kept


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_of_a_plain_loop_for_each_seed(name):
    method = sized_method(name, 12, 16)
    recipe = Recipe(iterations=25, lr=0.05, weight_decay=0.02)
    targets = torch.randn(3, 16, 12, dtype=torch.float64)
    expected = [
        plain_loop(method.make(seed).double(), target, recipe)
        for seed, target in enumerate(targets)
    ]
    found = fit([method.make(seed).double() for seed in range(3)], targets, recipe)
    torch.testing.assert_close(found, torch.stack(expected))


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


def test_a_target_that_the_method_can_make_is_met():
    method = sized_method("kradapter", 20, 16)
    made = method.make(1)
    torch.nn.init.normal_(made.u)
    target = made.delta().detach()
    trained = fit([method.make(2)], target.unsqueeze(0), Recipe(2000, lr=0.02, weight_decay=0.0))[0]
    assert torch.linalg.matrix_norm(trained - target) < 0.1 * torch.linalg.matrix_norm(target)
    assert trained.isfinite().all()
