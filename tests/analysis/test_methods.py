import pytest
import torch

from vlkr.adapters.registry import ADAPTERS
from vlkr.approximation.methods import DEFAULT_METHODS, TOLERANCE, budget, optimum, sized_method
from vlkr.errors import VlkrError


def test_the_budget_of_the_published_size():
    assert budget(768, 1024) == 768 * (32 + 32)
    assert budget(768, 1024, num_terms=3) == 3 * 768 * (32 + 32)


@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize("size", [(768, 1024), (1024, 768), (768, 768)])
def test_methods_meet_the_budget_or_keep_their_own_size(size, num_terms):
    goal = budget(*size, num_terms=num_terms)
    for name in DEFAULT_METHODS:
        method = sized_method(name, *size, num_terms=num_terms)
        kind = name.partition(":")[0]
        expected = ADAPTERS[kind].num_parameters(*size, **method.options)
        assert method.parameters == expected == sum(p.numel() for p in method.make(1).parameters())
        if kind in ("vera", "full"):
            assert abs(method.parameters / goal - 1) > TOLERANCE
        else:
            assert method.parameters == pytest.approx(goal, rel=0.03), name


def test_seeds_change_factors_and_bases():
    for name in ("lora", "randlora", "vera"):
        method = sized_method(name, 12, 16)
        one, again, two = method.make(1), method.make(1), method.make(2)
        tensors = {**dict(one.named_parameters()), **dict(one.named_buffers())}
        same = {**dict(again.named_parameters()), **dict(again.named_buffers())}
        other = {**dict(two.named_parameters()), **dict(two.named_buffers())}
        assert all(torch.equal(t, same[key]) for key, t in tensors.items())
        assert any(not torch.equal(t, other[key]) for key, t in tensors.items())


def test_making_an_adapter_leaves_the_global_generator_alone():
    method = sized_method("lora", 12, 16)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    method.make(1)
    assert torch.equal(torch.rand(2), expected)


def test_options_are_kept():
    method = sized_method("kradapter:rule=balanced,num_terms=3", 12, 16)
    assert method.options["num_terms"] == 3
    assert method.make(1).rule == "balanced"
    assert sized_method("lora:rank=2", 12, 16).parameters == 2 * (12 + 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lorra", "did you mean 'lora'"),
        ("lora:rnk=2", "no option 'rnk'"),
        ("lora:rank", "'rank' in method 'lora:rank' is no option"),
        ("dora", "'dora' has no change of a weight by itself"),
        ("bitfit", "'bitfit' has no change of a weight by itself"),
        ("lora:rank=0", "rank 0 is too small"),
    ],
)
def test_wrong_methods_are_named(name, message):
    with pytest.raises(VlkrError, match=message):
        sized_method(name, 12, 16)


@pytest.mark.parametrize("name", ["sinlora", "randlora", "vera", "full", "kradapter:num_factors=3"])
def test_methods_without_a_closed_form_have_no_optimum(name):
    assert optimum(sized_method(name, 12, 16).make(1), torch.randn(16, 12)) is None
