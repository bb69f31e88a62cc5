import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlkr
from vlkr.config import OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig
from vlkr.datasets.loading import Batch
from vlkr.models.clip import load_clip
from vlkr.training import module as training
from vlkr.training.module import FewShotModule, make_optimizer
from vlkr.training.recipe import adapt

NAMES = tuple(f"thing {i}" for i in range(12))


@pytest.fixture
def module(small):
    bundle = load_clip(small)
    torch.manual_seed(0)
    vlkr.add_adapters(bundle.model, "kradapter")
    for p in vlkr.adapter_parameters(bundle.model):
        nn.init.normal_(p, std=0.1)
    options = OptimizerConfig()
    return FewShotModule(bundle, NAMES, ("a {c}.",), options, seed=1, classes_per_step=5)


def test_a_step_uses_the_classes_of_the_batch_and_random_further_ones(module):
    labels = torch.tensor([3, 3, 7])
    seen = set()
    for _ in range(50):
        chosen = module._choose_classes(labels).tolist()
        assert len(chosen) == 5
        assert chosen == sorted(set(chosen))
        assert {3, 7} < set(chosen)
        seen.update(chosen)
    assert seen == set(range(12))
    many = torch.arange(8)
    assert module._choose_classes(many).tolist() == list(range(8))
    module.classes_per_step = 12
    assert module._choose_classes(labels) is None


def test_logits_of_chosen_classes_are_those_among_all(module):
    images = torch.randn(2, 3, 16, 16)
    chosen = torch.tensor([1, 4, 9])
    with torch.no_grad():
        torch.testing.assert_close(module(images, chosen), module(images)[:, chosen])


def test_loss_is_of_the_labels_among_the_chosen_classes(module, monkeypatch):
    images = torch.randn(3, 3, 16, 16)
    labels, chosen = torch.tensor([9, 1, 9]), torch.tensor([1, 4, 7, 9, 11])
    monkeypatch.setattr(module, "_choose_classes", lambda _: chosen)
    trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, is_last_batch=False)
    monkeypatch.setattr(FewShotModule, "trainer", trainer)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    loss = module.training_step(Batch(images, labels, ["a", "b", "c"], [None] * 3), 0)
    logits = module(images)[:, [1, 4, 7, 9, 11]]
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([3, 0, 3])))


def test_dropout_differs_by_epoch_and_batch(module, monkeypatch):
    def drawn(epoch, batch):
        monkeypatch.setattr(FewShotModule, "current_epoch", epoch)
        module.on_train_batch_start(None, batch)
        return torch.rand(4).tolist()

    draws = [drawn(epoch, batch) for epoch in range(3) for batch in range(3)]
    assert len({tuple(draw) for draw in draws}) == 9
    assert drawn(1, 2) == draws[5]


def test_accumulated_batches_train_as_one_composition_or_many(small, colors, tmp_path, monkeypatch):
    def adapters(name):
        data = DataConfig(
            root=colors, shots=2, batch_size=2, min_steps_per_epoch=5, crop_scale=(1.0, 1.0)
        )
        trainer = TrainerConfig(
            epochs=2, accumulate_grad_batches=2, progress=False, accelerator="cpu"
        )
        result = adapt(tmp_path / name, small, data=data, trainer=trainer)
        return vlkr.adapter_state_dict(result.bundle.model)

    once = adapters("once")
    never = SimpleNamespace(open=False, begin=lambda: None)
    monkeypatch.setattr(training, "ComposedWeightCache", lambda model: never)
    many = adapters("many")
    moved = max(t.abs().max() for key, t in once.items() if key.endswith(".u"))
    assert moved > 1e-4
    torch.testing.assert_close(once, many, rtol=1e-2, atol=2e-4)


def test_a_frozen_tower_and_blocks_below_the_first_adapter_keep_no_graph(small):
    bundle = load_clip(small)
    vlkr.add_adapters(bundle.model, "kradapter", towers=("visual",), blocks=[-1])
    blocks = bundle.model.visual.transformer.resblocks
    graph = []
    for block in blocks:
        block.register_forward_hook(lambda m, x, y: graph.append(y.requires_grad))
    images = torch.randn(2, 3, 16, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        text = bundle.model.encode_text(bundle.tokenizer(["a"]))
        assert not text.requires_grad
        assert not kept
        assert bundle.model.encode_image(images).requires_grad
    assert graph == [False] * (len(blocks) - 1) + [True]


def cosine(steps, decay_steps):
    return [0.5 * (1 + math.cos(math.pi * step / decay_steps)) for step in steps]


@pytest.mark.parametrize(
    ("warmup_steps", "total_steps", "expected"),
    [
        pytest.param(0, 8, cosine(range(9), 8), id="falls from the peak to zero"),
        pytest.param(
            4, 12, [0.25, 0.5, 0.75, 1.0, *cosine(range(9), 8)], id="after a linear warm-up"
        ),
        pytest.param(0, 2, [1, 0.5, 0, 0, 0, 0], id="stays at zero"),
        pytest.param(9, 3, [1 / 9, 2 / 9, 3 / 9, 4 / 9], id="warm-up longer than the run"),
    ],
)
def test_learning_rates(warmup_steps, total_steps, expected):
    options = OptimizerConfig(lr=0.2, warmup_steps=warmup_steps)
    optimizer, schedule = make_optimizer([nn.Parameter(torch.zeros(2))], options, total_steps)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.2 * factor for factor in expected], abs=1e-12)


def test_weight_decay_is_decoupled():
    parameter = nn.Parameter(torch.ones(2))
    optimizer, _ = make_optimizer([parameter], OptimizerConfig(lr=0.1, weight_decay=0.5), 10)
    parameter.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 1 - 0.1 * 0.5))
