"""Few-shot splits that depend on the samples' keys and the seed, and on nothing else."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from vlkr.datasets.sources import Sample, unit_hash
from vlkr.errors import VlkrError


@dataclass(frozen=True)
class FewShotSplit:
    """The samples to train on and to validate with, by label and then by hash."""

    train: list[Sample]
    val: list[Sample]


def few_shot_split(
    samples: Iterable[Sample], class_names: Sequence[str], shots: int, seed: int
) -> FewShotSplit:
    """Chooses ``shots`` training and ``min(shots, 4)`` validation samples a class.

    A class's samples are ranked by a hash of seed and key, so the choice does not depend on the
    order or the sharding in which they are read, and that of fewer shots is part of that of more.
    One pass; memory holds the best so far. A class that is short of samples trains on those it
    has, repeated to ``shots`` as in CoOp, and gets fewer or no validation samples.

    Args:
        samples: the training split.
        class_names: by label.
        shots: training samples a class, at least 1.
        seed: of the split.

    Raises:
        VlkrError: if ``shots`` is below 1, or a class has no sample.
    """
    if shots < 1:
        raise VlkrError(f"shots {shots} is too small, expected at least 1 image a class")
    keep = shots + min(shots, 4)
    # Heaps of the smallest hashes: negated, so that the largest kept one is on top.
    kept: list[list[tuple[float, str, Sample]]] = [[] for _ in class_names]
    for sample in samples:
        entry = (-unit_hash(sample.key, seed), sample.key, sample)
        heap = kept[sample.label]
        if len(heap) < keep:
            heapq.heappush(heap, entry)
        elif entry > heap[0]:
            heapq.heapreplace(heap, entry)
    train: list[Sample] = []
    val: list[Sample] = []
    for name, heap in zip(class_names, kept, strict=True):
        ranked = [sample for _, _, sample in sorted(heap, reverse=True)]
        if not ranked:
            raise VlkrError(f"class {name!r} is empty: the training split has no image of it")
        if len(ranked) < shots:
            number = f"{len(ranked)} image{'s' if len(ranked) > 1 else ''}"
            warnings.warn(
                f"class {name!r} has {number} to train on, repeated to {shots} shots", stacklevel=2
            )
        train += islice(cycle(ranked[:shots]), shots)
        val += ranked[shots:]
    return FewShotSplit(train, val)
