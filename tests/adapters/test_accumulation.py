import pytest
import torch
from torch import nn

import vlkr
from vlkr.adapters import ADAPTERS, ComposedWeightCache


@pytest.mark.parametrize("method", sorted(ADAPTERS))
def test_gradients_are_those_of_composing_for_each_batch(method):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(8, 2, batch_first=True), "fc": nn.Linear(8, 8)}
    )
    vlkr.add_adapters(model, method, targets=["attn.q", "attn.v", "attn.out", "fc"])
    for p in vlkr.adapter_parameters(model):
        nn.init.normal_(p, std=0.3)
    batches = [torch.randn(2, 3, 8) for _ in range(3)]

    def accumulate():
        for x in batches:
            model["fc"](model["attn"](x, x, x)[0]).square().sum().backward()
        grads = [p.grad for p in vlkr.adapter_parameters(model)]
        model.zero_grad(set_to_none=True)
        return grads

    expected = accumulate()
    once = ComposedWeightCache(model)
    once.begin()
    calls = []
    for module in model.modules():
        if isinstance(module, vlkr.adapters.Adapter) and not module.has_low_rank_forward:
            delta = module.delta
            module.delta = lambda w=None, delta=delta: calls.append(1) or delta(w)
    for x in batches:
        model["fc"](model["attn"](x, x, x)[0]).square().sum().backward()
    assert not calls  # nothing was composed in between
    once.finish()
    grads = [p.grad for p in vlkr.adapter_parameters(model)]
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)
    assert not any(host.composed_weights for _, host in vlkr.adapters.inject.adapter_layers(model))
