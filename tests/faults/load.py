"""Loads, each in a process of its own: ``python -m faults.load RESULT FUNCTION ARGUMENT...``.

RESULT gets JSON: what the function found, the process's peak memory in MiB and the seconds.
"""

import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

IMAGES_AT_A_TIME = 256


def memory(name):
    """``VmHWM``, the peak of the resident memory, or ``VmRSS``, that of now, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class Seen:
    """What tells that each sample came once, of any number of them."""

    def __init__(self):
        self.images = self.labels = self.keys = self.squares = 0

    def add(self, labels, keys):
        numbers = [int(key) for key in keys]
        self.images += len(numbers)
        self.labels += int(labels.sum())
        self.keys += sum(numbers)
        self.squares += sum(number * number for number in numbers)


def evaluate_stream(folder, model):
    """The images of a split encoded batch by batch, as evaluation does."""
    from vlkr.datasets import load_dataset
    from vlkr.evaluation.features import evaluation_mode, feature_batches
    from vlkr.models.loading import load_model

    seen = Seen()
    source = load_dataset(Path(folder)).source("test")
    with evaluation_mode(load_model(model), "cpu") as subject:
        for part in feature_batches(subject, source, IMAGES_AT_A_TIME, 0, cache=False):
            seen.add(part.labels, part.keys)
    return vars(seen)


def fingerprint_stream(folder):
    """The split's fingerprint, for which one process reads all shards as one source."""
    from vlkr.datasets import load_dataset
    from vlkr.evaluation.features import fingerprint

    return {"fingerprint": fingerprint(load_dataset(Path(folder)).source("test"))}


def train_stream(folder, per_shard):
    """Few shots drawn from a split, then an epoch of all its images, augmented and shuffled."""
    from vlkr.datasets import DataConfig, load_dataset
    from vlkr.datasets.epochs import TrainLoader
    from vlkr.datasets.loading import BadSamples, TrainTransform, to_tensor
    from vlkr.datasets.streaming import EpochPlan, StreamedBatches
    from vlkr.datasets.training import FewShotDataModule

    dataset = load_dataset(Path(folder))
    dataset = replace(dataset, splits={"train": dataset.source("test")})
    few = FewShotDataModule(dataset, DataConfig(shots=16), 1, to_tensor, to_tensor)
    source = dataset.source("train")
    counts = [int(per_shard)] * len(source.shards())
    plan = EpochPlan(counts, IMAGES_AT_A_TIME, 1, 1, seed=1, buffer=1024)
    augment = TrainTransform((16, 16), [0.5] * 3, [0.5] * 3, "bilinear", (0.5, 1.0), True)
    bad = BadSamples()
    batches = StreamedBatches(source, plan, augment, bad)
    seen = Seen()
    for batch in TrainLoader(batches, 0, bad):
        seen.add(batch.labels, batch.keys)
    return {**vars(seen), "drawn": len(few.train_keys)}


def embed(model, num_classes, num_templates):
    """Class embeddings, and the memory that they take beside what is there before."""
    from vlkr.evaluation.evaluate import _TEXTS_PER_BATCH
    from vlkr.models.loading import load_model
    from vlkr.models.zero_shot import class_embeddings, tokenize_prompts

    bundle = load_model(model)
    prompts = tokenize_prompts(
        bundle.tokenizer,
        [f"thing {i}" for i in range(int(num_classes))],
        [f"photo {i} of a {{c}}." for i in range(int(num_templates))],
    )
    more = []
    with torch.inference_mode():
        # What is taken once: a whole chunk of texts, and what the allocator keeps of it.
        class_embeddings(bundle.model, prompts[:_TEXTS_PER_BATCH], _TEXTS_PER_BATCH)
        for _ in range(3):  # the system may give memory back or take it meanwhile, which adds to it
            Path("/proc/self/clear_refs").write_text("5")
            before = memory("VmRSS")
            class_embeddings(bundle.model, prompts, _TEXTS_PER_BATCH)
            more.append(memory("VmHWM") - before)
    return {"tokens_mib": prompts.nbytes / 2**20, "more_mib": min(more)}


def command(*arguments):
    """A command of the command line, which must succeed; its seconds without what it imports."""
    from vlkr.cli import COMMANDS, main

    importlib.import_module(COMMANDS[arguments[0]].function.partition(":")[0])
    start = time.monotonic()
    if code := main(list(arguments)):
        sys.exit(code)
    return {"command_seconds": time.monotonic() - start}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, function, *given = sys.argv[1:]
    start = time.monotonic()
    result = globals()[function](*given)
    result |= {"peak_mib": memory("VmHWM"), "seconds": time.monotonic() - start}
    Path(target).write_text(json.dumps(result))
