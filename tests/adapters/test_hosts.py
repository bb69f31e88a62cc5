"""What torch does with modules keeps working on adapted ones, and no state is swapped."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import tolerance
from torch import nn
from torch.func import functional_call, vmap

from vlkr.adapters import (
    add_adapters,
    merge_and_unload,
    merged,
    remove_adapters,
    set_adapter,
    set_adapter_scale,
)
from vlkr.adapters.hosts import AdapterHost, adapter_layers, weights_hash
from vlkr.errors import VlkrError


@pytest.fixture(params=["linear-wide", "mha-split", "mha-kdim", "open-clip-split", "timm-fused"])
def model_and_inputs(request, hosts, adapt):
    host = hosts[request.param]
    model, _, _ = adapt(host.build(), "kradapter", targets=host.targets)
    return model.eval(), host.inputs()


def close(actual, expected):
    atol = tolerance(expected, terms=64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(model_and_inputs, copied):
    model, x = model_and_inputs
    expected = model(x).detach()
    twin = copied(model)
    close(twin(x), expected)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    set_adapter_scale(twin, 0.0)
    close(model(x), expected)
    assert not torch.allclose(twin(x), expected, atol=1e-3)
    set_adapter_scale(twin, 1.0)
    merge_and_unload(twin)
    close(twin(x), expected)
    for module in twin.modules():
        assert not module._forward_pre_hooks
        assert not isinstance(module, AdapterHost)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own attention
def test_functional_call_and_vmap(model_and_inputs):
    model, x = model_and_inputs
    expected = model(x).detach()
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    close(functional_call(model, tensors, (x,)), expected)
    is_factor = {name: ".adapters." in name for name in tensors}
    off = {n: torch.zeros_like(t) if is_factor[n] else t for n, t in tensors.items()}
    base = functional_call(model, off, (x,)).detach()
    remove_adapters(plain := copy.deepcopy(model))
    close(base, plain(x).detach())
    both = {n: torch.stack([t, off[n]]) for n, t in tensors.items()}
    results = vmap(lambda state: functional_call(model, state, (x,)))(both)
    close(results[0], expected)
    close(results[1], base)


def test_gradients_through_functional_call(model_and_inputs):
    model, x = model_and_inputs
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda state: functional_call(model, state, (x,)).square().sum())(
        tensors
    )
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(
                grads[name], p.grad, rtol=0, atol=tolerance(p.grad, terms=64, condition=4)
            )


def test_threads_do_not_disturb_each_other(model_and_inputs):
    model, x = model_and_inputs
    expected = model(x).detach()
    atol = tolerance(expected, terms=64)
    wrong = []

    def work():
        for _ in range(60):
            if not torch.allclose(model(x).detach(), expected, rtol=0, atol=atol):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_hosts_of_one_class_share_one_class(hosts):
    model = nn.Sequential(*(hosts["open-clip-split"].build() for _ in range(2)))
    add_adapters(model, "kradapter", targets=["q", "out"])
    classes = {type(host) for _, host in adapter_layers(model)}
    assert len(classes) == 1


def test_a_forward_writes_no_attribute(model_and_inputs):
    model, x = model_and_inputs

    def state():
        return {
            (path, key): tuple(map(id, value.values())) if isinstance(value, dict) else id(value)
            for path, module in model.named_modules()
            for key, value in vars(module).items()
        }

    before = state()
    model(x).sum().backward()
    assert state() == before


@pytest.mark.parametrize(
    ("action", "change"),
    [
        ("merge adapters", merge_and_unload),
        ("scale adapters", lambda m: set_adapter_scale(m, 0.5)),
        ("remove adapters", remove_adapters),
        ("activate adapters", lambda m: set_adapter(m, "default")),
        ("add adapters", lambda m: add_adapters(m, "lora", targets=["0"], adapter_name="more")),
    ],
)
def test_nothing_is_changed_while_adapters_are_merged(adapt, action, change):
    model, base, _ = adapt(nn.Sequential(nn.Linear(6, 6)), "kradapter", targets=["0"])
    x = torch.randn(3, 6)
    expected = model(x).detach()
    with merged(model), pytest.raises(VlkrError, match=f"cannot {action} inside merged"):
        change(model)
    close(model(x), expected)
    assert torch.equal(model.state_dict()["0.weight"], base.state_dict()["0.weight"])


def test_a_base_module_called_adapters_counts_as_base():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters = nn.Linear(2, 2)
            self.other = nn.Linear(2, 2)

        def forward(self, x):
            return self.other(self.adapters(x))

    model = Base()
    before = weights_hash(model)
    add_adapters(model, "kradapter", targets=["other"])
    assert weights_hash(model) == before
    model.adapters.weight.data.fill_(7)
    assert weights_hash(model) != before


def test_a_module_whose_attribute_a_host_needs_is_refused():
    class Own(nn.Linear):
        slots = 3

    model = nn.Sequential(Own(4, 4))
    with pytest.raises(VlkrError, match="Own has an attribute 'slots' of its own"):
        add_adapters(model, "kradapter", targets=["0"])
    assert type(model[0]) is Own
