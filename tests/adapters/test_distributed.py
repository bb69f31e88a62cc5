"""Adapters under data parallelism and sharding: two processes equal one on the joined batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_near
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vlkr


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)

    def forward(self, x):
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.fc2(self.fc1(x).relu())


def make(method):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    targets = ["*.attn.[qkv]", "*.attn.out", "*.fc?"]
    vlkr.add_adapters(model, method, targets=targets)
    for p in vlkr.adapter_parameters(model):
        nn.init.normal_(p, std=0.2)
    return model


def batch():
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))


def train(model, x, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def worker(rank, port, method, kind, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    model = make(method)
    x = batch().chunk(2)[rank]
    if kind == "ddp":
        train(DistributedDataParallel(model), x)
        state = model.state_dict()
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, x)
        state = {key: value.full_tensor() for key, value in model.state_dict().items()}
    if rank == 0:
        torch.save(state, folder / "state.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["kradapter", "lora"])
def test_two_processes_train_as_one_on_the_joined_batch(method, kind, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, method, kind, tmp_path), nprocs=2)
    joint = torch.load(tmp_path / "state.pt", weights_only=True)
    single = make(method)
    start = {key: value.clone() for key, value in single.state_dict().items()}
    train(single, batch())
    own = single.state_dict()
    assert joint.keys() == own.keys()
    assert_near(joint.values(), own.values(), condition=8)
    changed = {key for key in start if not torch.equal(start[key], joint[key])}
    assert changed == {key for key in start if ".adapters." in key}
