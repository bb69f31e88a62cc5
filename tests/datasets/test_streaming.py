import json
import multiprocessing
import os
import random
import signal
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers import color_image
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from streams import Listed, dealt, tiny_samples
from torchvision.transforms.v2.functional import pil_to_tensor

from vlkr.datasets import BadSample, Sample, View
from vlkr.datasets.epochs import (
    EpochSampler,
    FewShotImages,
    MemoryBatches,
    MemoryPlan,
    TrainLoader,
)
from vlkr.datasets.loading import BadSamples, TrainTransform, evaluation_loader
from vlkr.datasets.streaming import EpochPlan, StreamedBatches
from vlkr.errors import VlkrError
from vlkr.files import write_json
from vlkr.training.trainer import quiet_lightning

AUGMENT = TrainTransform((4, 4), [0.5] * 3, [0.5] * 3, "bilinear", (0.3, 1.0), True)


def plan_of(source, batch_size=4, min_steps=1, world_size=1, seed=1, buffer=16):
    counts = [len(part) for part in source.parts]
    return EpochPlan(counts, batch_size, min_steps, world_size, seed, buffer)


def loader_of(source, rank=0, workers=0, bad=None, **options):
    plan = plan_of(source, **options)
    bad = bad or BadSamples()
    return TrainLoader(StreamedBatches(source, plan, AUGMENT, bad), rank, bad, workers)


def keys_of(batches):
    return [batch.keys for batch in batches]


# The plan


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any),
    batch_size=st.integers(1, 9),
    min_steps=st.integers(1, 12),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_lanes_share_the_epoch_and_batches_are_of_one_size(
    counts, batch_size, min_steps, world_size, epoch
):
    if sum(counts) < world_size:
        with pytest.raises(VlkrError, match=f"{sum(counts)} training images cannot be shared by"):
            EpochPlan(counts, batch_size, min_steps, world_size, 1, 16)
        return
    plan = EpochPlan(counts, batch_size, min_steps, world_size, 1, 16)
    sizes = [plan.size(batch) for batch in range(plan.steps * world_size)]
    step = batch_size * world_size
    enough = sum(counts) > (min_steps - 1) * step
    assert sum(sizes) == plan.num_samples == (sum(counts) if enough else min_steps * step)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert max(sizes) <= max(batch_size, 2)
    assert plan.steps >= min_steps or max(sizes) == 2
    read = Counter()
    for lane in range(plan.lanes):
        segments = plan.segments(epoch, lane)
        own = sum(stop - start for _, start, stop in segments)
        assert own == sum(sizes[lane :: plan.lanes])
        for shard, start, stop in segments:
            assert 0 <= start < stop <= counts[shard]
            read.update((shard, i) for i in range(start, stop))
    # Every sample as often as there are passes over the data, the last one may be cut short.
    whole, rest = divmod(plan.num_samples, sum(counts))
    every = {(shard, i) for shard, count in enumerate(counts) for i in range(count)}
    assert set(read) == every
    assert (
        Counter(read.values()) == Counter({whole + 1: rest, whole: len(every) - rest}) - Counter()
    )


def test_shards_come_in_another_order_each_epoch():
    plan = EpochPlan([4] * 12, 4, 1, 1, 1, 16)
    orders = [
        [shard for lane in range(8) for shard, _, _ in plan.segments(epoch, lane)]
        for epoch in range(5)
    ]
    assert len({tuple(order) for order in orders}) == 5


# Batches


@pytest.mark.parametrize("count", range(1, 51))
def test_two_processes_of_two_workers_see_each_sample_once(count):
    source = dealt(tiny_samples(count), 7)
    if count == 1:
        with pytest.raises(VlkrError, match="1 training images cannot be shared by 2 processes"):
            plan_of(source, world_size=2)
        return
    plan = plan_of(source, world_size=2)
    for epoch in range(2):
        seen = Counter()
        steps = set()
        for rank in range(2):
            order = EpochSampler(plan, rank)
            order.set_epoch(epoch)
            # A data loader deals its batches out to the workers in turn.
            workers = [StreamedBatches(source, plan, AUGMENT, BadSamples()) for _ in range(2)]
            items = list(order)
            steps.add(len(items))
            for i, item in enumerate(items):
                seen.update(workers[i % 2][item].keys)
        assert seen == Counter(f"k{i}" for i in range(count))
        assert len(steps) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(workers):
    source = dealt(tiny_samples(61), 7)
    alone, shared = loader_of(source), loader_of(source, workers=workers)
    for epoch in range(3):
        alone.order.set_epoch(epoch)
        shared.order.set_epoch(epoch)
        expected = list(alone)
        found = list(shared)
        assert keys_of(found) == keys_of(expected)
        assert all(
            torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            for a, b in zip(found, expected, strict=True)
        )


def test_order_is_shuffled_and_follows_from_seed_and_epoch():
    source = dealt(tiny_samples(200), 7)

    def epoch(seed, number):
        loader = loader_of(source, seed=seed, buffer=64)
        loader.order.set_epoch(number)
        return [key for batch in loader for key in batch.keys]

    assert epoch(1, 2) == epoch(1, 2)
    orders = [epoch(seed, number) for seed in (1, 2) for number in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    for order in orders:
        neighbours = sum(abs(int(a[1:]) - int(b[1:])) == 1 for a, b in pairwise(order))
        assert neighbours < 20


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_augmentation_differs_from_epoch_to_epoch_and_from_pass_to_pass(kind):
    samples = [Sample(f"k{i}", color_image("red", i), 0) for i in range(3)]
    if kind == "stream":
        loader = loader_of(dealt(samples, 2), batch_size=3, min_steps=4)
    else:
        images, plan = FewShotImages(samples, AUGMENT), MemoryPlan(3, 3, 4, 1, seed=1)
        loader = TrainLoader(MemoryBatches(images, plan), 0, BadSamples())
    images = {}
    for epoch in range(2):
        loader.order.set_epoch(epoch)
        for step, batch in enumerate(loader):
            for key, image in zip(batch.keys, batch.images, strict=True):
                images.setdefault(key, {})[epoch, step] = image.numpy().tobytes()
    for views in images.values():
        assert len(views) >= 5
        assert len(set(views.values())) == len(views)


def test_labels_and_domains_go_with_the_images():
    samples = [Sample(s.key, s.image, s.label, f"d{i % 3}") for i, s in enumerate(tiny_samples(9))]
    by_key = {sample.key: sample for sample in samples}
    for batch in loader_of(dealt(samples, 3)):
        for key, label, domain in zip(batch.keys, batch.labels, batch.domains, strict=True):
            assert (label, domain) == (by_key[key].label, by_key[key].domain)


def test_each_shard_is_read_once_by_one_worker():
    source = dealt(tiny_samples(80), 8)
    opened = Counter()

    class Watched(Listed):
        def __iter__(self):
            opened[self.parts[0][0].key] += 1
            return super().__iter__()

    source = Listed([[*part] for part in source.parts])
    shards = [Watched([part]) for part in source.parts if part]
    plan = plan_of(source)
    batches = StreamedBatches(source, plan, AUGMENT, BadSamples())
    batches.shards = shards if len(shards) == len(source.parts) else batches.shards
    list(map(batches.__getitem__, EpochSampler(plan)))
    # Lanes begin and end within shards: seven borders between eight lanes.
    assert sum(opened.values()) <= len(shards) + plan.lanes - 1


def test_memory_is_bounded_by_the_buffer():
    def peak(count):
        class Made:
            def __init__(self, numbers):
                self.numbers = numbers

            def __iter__(self):
                image = tiny_samples(1)[0].image
                return (Sample(f"k{i}", image + bytes(50_000), 0) for i in self.numbers)

        class Source:
            parts = tuple(range(i, count, 7) for i in range(7))

            def shards(self):
                return [Made(numbers) for numbers in self.parts]

        loader = loader_of(Source(), batch_size=8, buffer=32)
        tracemalloc.start()
        try:
            assert sum(len(batch.keys) for batch in loader) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(300), peak(3000)
    assert large < small + 8 * 50_000
    assert large < 60 * 50_000


# Picked samples


def test_picked_samples_come_as_often_as_asked():
    source = View(dealt(tiny_samples(6), 3), times={"k1": 2, "k4": 1, "k5": 3})
    expected = ["k1", "k1", "k4", "k5", "k5", "k5"]
    assert [sample.key for sample in source] == expected
    assert [sample.key for shard in source.shards() for sample in shard] == expected


# Bad samples


def bad_source():
    samples = tiny_samples(12)
    samples[5] = Sample("k5", b"no image", 1, shard="1.tar")
    return Listed([samples[:4], samples[4:8], samples[8:]])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_place_of_a_bad_image_is_taken_and_it_is_counted(workers):
    with pytest.raises(VlkrError, match=r"^1\.tar, sample 'k5' is not an image"):
        list(loader_of(bad_source(), workers=workers))
    loader = loader_of(bad_source(), workers=workers, bad=BadSamples(1))
    for _ in range(2):  # anew in each epoch
        with pytest.warns(UserWarning, match=r"^1 bad sample was skipped; the first: 1\.tar, samp"):
            batches = list(loader)
        assert [len(batch.keys) for batch in batches] == [4, 4, 4]
        counts = Counter(key for batch in batches for key in batch.keys)
        assert set(counts) == {f"k{i}" for i in range(12)} - {"k5"}
        assert sorted(counts.values()) == [1] * 10 + [2]


def test_what_the_source_refuses_was_counted_before():
    source = dealt(tiny_samples(10), 3)
    plan = plan_of(source)
    source.parts[1].insert(1, BadSample("has no label", "x"))
    batches = StreamedBatches(source, plan, AUGMENT, BadSamples())
    keys = [key for item in EpochSampler(plan) for key in batches[item].keys]
    assert sorted(keys) == sorted(f"k{i}" for i in range(10))


def test_a_shard_that_became_shorter_is_an_error():
    source = dealt(tiny_samples(40), 3)
    plan = plan_of(source)
    del source.parts[2][-1]
    batches = StreamedBatches(source, plan, AUGMENT, BadSamples())
    with pytest.raises(VlkrError, match=r"shard 2 of the training images ends after .* changed"):
        [batches[item] for item in EpochSampler(plan)]


# Going on in mid-epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_behind_the_batches_it_has_given_out(workers):
    source = dealt(tiny_samples(50), 7)
    whole = loader_of(source)
    whole.order.set_epoch(3)
    expected = list(whole)
    for seen in (0, 1, 5, len(expected) - 1):
        loader = loader_of(source, workers=workers)
        loader.order.set_epoch(3)
        batches = iter(loader)
        first = [next(batches) for _ in range(seen)]
        state = json.loads(json.dumps(loader.state_dict()))
        assert (state["epoch"], state["batch"]) == (3, seen)
        other = loader_of(source, workers=2 - workers)
        other.load_state_dict(state)
        rest = list(other)
        assert keys_of(first + rest) == keys_of(expected)
        assert all(
            torch.equal(a.images, b.images) for a, b in zip(first + rest, expected, strict=True)
        )
        assert len(list(other)) == len(expected)  # from the start again


def test_a_checkpoint_of_another_epoch_length_is_refused():
    state = loader_of(dealt(tiny_samples(50), 7)).state_dict()
    with pytest.raises(VlkrError, match="checkpoint is of 13 batches per epoch, this run of 7"):
        loader_of(dealt(tiny_samples(25), 7)).load_state_dict(state)
    with pytest.raises(VlkrError, match="is of 13 batches per epoch, this run of 7"):
        loader_of(dealt(tiny_samples(50), 7), world_size=2).load_state_dict(state)


class Recorder(L.LightningModule):
    """Notes which samples its steps see, and in which augmentation."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.keys, batch.images.sum().item()))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tmp_path, loader, checkpoint=None):
    module = Recorder()
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[every],
        )
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return module.seen


def few_shot_loader(workers):
    images = FewShotImages(tiny_samples(10), AUGMENT)
    plan = MemoryPlan(10, 4, 5, 1, seed=1)
    return TrainLoader(MemoryBatches(images, plan), 0, BadSamples(), workers)


LOADERS = {
    "few, in memory": few_shot_loader,
    "a stream": lambda workers: loader_of(dealt(tiny_samples(19), 7), workers=workers),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_lightning_resumes_behind_any_step(tmp_path, kind, workers):
    """A checkpoint after each of 3 x 5 steps; from each the rest is that of the unbroken run."""
    whole = fit(tmp_path, LOADERS[kind](workers))
    assert [(epoch, batch) for epoch, batch, _, _ in whole] == [
        (epoch, batch) for epoch in range(3) for batch in range(5)
    ]
    # 5 and 10 lie at the end of an epoch.
    for step in (1, 4, 5, 6, 10, 13) if workers == 0 else (5, 7):
        checkpoint = tmp_path / f"step={step}.ckpt"
        rest = fit(tmp_path, LOADERS[kind](workers), checkpoint)
        assert rest == whole[step:]


# Kills


def stream_to(path: Path) -> None:
    """Two epochs; after each batch the keys and the loader's state are written in one step."""
    before = json.loads(path.read_text()) if path.exists() else {"keys": [], "state": None}
    loader = loader_of(dealt(tiny_samples(150), 7), workers=2, seed=5)
    keys, state = before["keys"], before["state"]
    if state:
        loader.load_state_dict(state)
    for epoch in range(state["epoch"] if state else 0, 2):
        loader.order.set_epoch(epoch)
        for batch in loader:
            keys.append(batch.keys)
            write_json(path, {"keys": keys, "state": loader.state_dict()})


def run_until(target, path, delay):
    process = multiprocessing.get_context("fork").Process(target=target, args=(path,))
    process.start()
    process.join(delay)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


def check_kills(tmp_path, kills):
    started = time.monotonic()
    assert run_until(stream_to, tmp_path / "whole.json", 300) == 0
    seconds = time.monotonic() - started
    whole = json.loads((tmp_path / "whole.json").read_text())["keys"]
    assert len(whole) == 2 * 38
    path, rng, killed = tmp_path / "broken.json", random.Random(0), 0
    while killed < kills:
        path.unlink(missing_ok=True)
        while run_until(stream_to, path, rng.uniform(0, 0.9 * seconds)) != 0:
            killed += 1
        assert json.loads(path.read_text())["keys"] == whole
    assert run_until(stream_to, path, 300) == 0
    assert json.loads(path.read_text())["keys"] == whole


def test_a_killed_epoch_goes_on_with_the_same_samples(tmp_path):
    check_kills(tmp_path, 3)


@pytest.mark.slow
def test_ten_killed_epochs_go_on_with_the_same_samples(tmp_path):
    check_kills(tmp_path, 10)


# Two processes for real


def see_everything(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    seen = {}
    for count in range(50, 0, -1):
        # A spawned process spawns its own; after the first loader's they are forked, in no time.
        if count < 50:
            multiprocessing.set_start_method("fork", force=True)
        source = dealt(tiny_samples(count), 7)
        evaluated = evaluation_loader(source, pil_to_tensor, 3, 2)
        seen[count] = {"evaluated": [key for batch in evaluated for key in batch.keys]}
        if count > 1:
            trained = loader_of(source, rank=dist.get_rank(), world_size=2, workers=2)
            seen[count]["trained"] = keys_of(trained)
    dist.barrier()
    write_json(folder / f"{rank}.json", seen)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_gloo_processes_of_two_workers_see_each_sample_once(tmp_path):
    torch.multiprocessing.spawn(see_everything, (tmp_path,), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for count in range(1, 51):
        expected = sorted(f"k{i}" for i in range(count))
        assert sorted(key for r in ranks for key in r[str(count)]["evaluated"]) == expected
        if count > 1:
            trained = [r[str(count)]["trained"] for r in ranks]
            assert sorted(key for own in trained for keys in own for key in keys) == expected
            assert len(trained[0]) == len(trained[1])
