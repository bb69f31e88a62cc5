"""Lightning's DDP: two processes train the adapters of one process on the joined batch."""

import os
import socket

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy

import vlkr
from vlkr.config import OptimizerConfig
from vlkr.datasets import few_shot_split, load_dataset
from vlkr.datasets.epochs import FewShotImages, MemoryBatches, MemoryPlan, TrainLoader
from vlkr.datasets.loading import BadSamples
from vlkr.models.clip import load_clip
from vlkr.training.module import FewShotModule
from vlkr.training.trainer import quiet_lightning


def train(model, root, rank, world_size, strategy):
    bundle, dataset = load_clip(model), load_dataset(root)
    torch.manual_seed(0)
    vlkr.add_adapters(bundle.model, "kradapter")
    split = few_shot_split(dataset.source("train"), dataset.class_names, 4, seed=1)
    images = FewShotImages(split.train, bundle.preprocess)
    plan = MemoryPlan(len(images), 4 // world_size, 3, world_size, seed=1)
    loader = TrainLoader(MemoryBatches(images, plan), rank, BadSamples())
    module = FewShotModule(
        bundle, dataset.class_names, dataset.templates, OptimizerConfig(), seed=1
    )
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=world_size,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, loader)
    return {key: value.clone() for key, value in bundle.model.state_dict().items()}


def worker(rank, port, model, root, output):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    state = train(model, root, rank, 2, DDPStrategy(process_group_backend="gloo"))
    torch.save(state, output / f"{rank}.pt")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.slow
def test_two_processes_train_as_one_on_the_joined_batch(small, colors, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, small, colors, tmp_path), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    base = load_clip(small).model.state_dict()
    single = train(small, colors, 0, 1, "auto")
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    torch.testing.assert_close(states[0], single, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(single[key], base[key]) for key in base)
    assert any(value.abs().max() > 1e-3 for key, value in single.items() if key.endswith(".u"))
