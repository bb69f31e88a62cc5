"""Few-shot splits that depend only on the samples' keys and the seed."""

from __future__ import annotations

import heapq
import warnings
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path

from vlkr.datasets.images import decode_image
from vlkr.datasets.options import DataConfig
from vlkr.datasets.registry import Dataset
from vlkr.datasets.samples import (
    BadSample,
    Joined,
    Sample,
    Source,
    View,
    good_samples,
    shuffled_by_hash,
    unit_hash,
)
from vlkr.datasets.split_files import FewShotSplit, read_split, take_split
from vlkr.errors import VlkrError

OnBad = Callable[[BadSample], object]
# The draw's group of a sample: its label, and its domain where that matters.
_Group = tuple[int, str]
# Negated hash, key, number and sample: the smallest entry of a heap is the one to give up first.
_Entry = tuple[float, str, int, Sample]


def few_shot_split(
    samples: Iterable[Sample],
    class_names: Sequence[str],
    shots: int,
    seed: int,
    *,
    fraction: float | None = None,
    val_fraction: float | None = None,
    per_domain: bool = False,
    max_bytes: float | None = None,
) -> FewShotSplit:
    """Draws ``shots`` training and ``min(shots, 4)`` validation samples per class.

    A class's samples are ranked by a hash of seed and key, so the choice does not depend on the
    order or the sharding in which they are read, and that of fewer shots is part of that of more.
    One pass; memory holds the best so far, and of these no more than ``max_bytes`` of images. A
    class that is short of samples trains on those it has, repeated to ``shots`` as in CoOp, and
    gets fewer or no validation samples. Shots that no class has are taken as the largest class's.

    Args:
        samples: the training split.
        class_names: by label.
        shots: training samples per class, at least 1.
        seed: random seed of the split.
        fraction: of each class's samples to train on, in place of ``shots``; rounded, at least
            one a class. The samples of a smaller fraction are part of those of a larger one.
        val_fraction: of the samples of each class and domain that are set aside to validate with
            before the others are drawn, in place of ``min(shots, 4)`` (0.2 in DomainBed).
        per_domain: draw ``shots`` or ``fraction`` from each class in each domain.
        max_bytes: of encoded images kept; beyond it the split is told without images.

    Raises:
        VlkrError: if a number is out of range, or a class has no sample.
    """
    _check(shots, fraction, val_fraction)
    by_domain = per_domain or val_fraction is not None
    limit = shots + min(shots, 4) if fraction is None and val_fraction is None else None
    ranked, has_images = _rank(samples, seed, by_domain, limit, max_bytes)
    missing = set(range(len(class_names))) - {label for label, _ in ranked}
    if missing:
        name = class_names[min(missing)]
        raise VlkrError(f"class {name!r} is empty: the training split has no image of it")
    val: dict[_Group, list[_Entry]] = defaultdict(list)
    pools: dict[_Group, list[_Entry]] = defaultdict(list)
    for (label, domain), entries in ranked.items():
        held_out = min(round((val_fraction or 0) * len(entries)), len(entries) - 1)
        first_val = len(entries) - held_out
        val[label, domain] = entries[first_val:]
        pools[label, domain if per_domain else ""] += entries[:first_val]
    shots = _within_reach(pools, class_names, shots) if fraction is None else shots
    train: list[_Entry] = []
    for group, pool in sorted(pools.items()):
        own = sorted(pool, reverse=True)
        wanted = shots if fraction is None else max(1, round(fraction * len(own)))
        train += islice(cycle(own[:wanted]), wanted)
        if val_fraction is None:
            val[group] += own[wanted : wanted + min(wanted, 4)]
    held = [entry for _, group in sorted(val.items()) for entry in group]
    positions = None if has_images else {key: i for _, key, i, _ in (*train, *held)}
    return FewShotSplit([entry[-1] for entry in train], [entry[-1] for entry in held], positions)


def _check(shots: int, fraction: float | None, val_fraction: float | None) -> None:
    if shots < 1:
        raise VlkrError(f"shots {shots} is too small, expected at least 1 image per class")
    if fraction is not None and not 0 < fraction <= 1:
        raise VlkrError(f"fraction {fraction} is out of range, expected above 0 and at most 1")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise VlkrError(
            f"validation fraction {val_fraction} is out of range, expected 0 or more, below 1"
        )


def _rank(
    samples: Iterable[Sample],
    seed: int,
    by_domain: bool,
    limit: int | None,
    max_bytes: float | None,
) -> tuple[dict[_Group, list[_Entry]], bool]:
    """The first ``limit`` samples of each group by hash, and whether they have their images."""
    heaps: dict[_Group, list[_Entry]] = defaultdict(list)
    held, has_images = 0, True
    for number, sample in enumerate(samples):
        if not has_images:
            sample = replace(sample, image=b"")
        heap = heaps[sample.label, (sample.domain or "") if by_domain else ""]
        entry = (-unit_hash(sample.key, seed), sample.key, number, sample)
        if limit is None or len(heap) < limit:
            heapq.heappush(heap, entry)
            held += len(sample.image)
        else:
            held += len(sample.image) - len(heapq.heappushpop(heap, entry)[-1].image)
        if max_bytes is not None and held > max_bytes:
            held, has_images = 0, False
            for heap in heaps.values():
                heap[:] = [(*entry[:3], replace(entry[3], image=b"")) for entry in heap]
    ranked = {group: sorted(heap, reverse=True) for group, heap in heaps.items()}
    for entries in ranked.values():
        for (_, key, _, _), (_, other, _, _) in pairwise(entries):
            if key == other:
                raise VlkrError(f"key {key!r} occurs twice in the training split")
    return ranked, has_images


def _within_reach(pools: dict[_Group, list[_Entry]], class_names: Sequence[str], shots: int) -> int:
    """At most the largest pool's size; one warning tells what is short."""
    sizes = Counter({group: len(entries) for group, entries in pools.items()})
    most = min(shots, max(sizes.values()))
    short = sorted((size, group) for group, size in sizes.items() if size < shots)
    if short:
        size, (label, domain) = short[0]
        name = repr(class_names[label]) + (f" of domain {domain!r}" if domain else "")
        number = f"{size} image{'s' if size > 1 else ''}"
        if most < shots:
            taken = f"{most} shot{'s' if most > 1 else ''}"
            text = f"no class has {shots} images to train on: taken as {taken}"
            if size < most:
                text += f", repeated in smaller classes (class {name} has {number})"
        elif len(short) == 1:
            text = f"class {name} has {number} to train on, repeated to {shots} shots"
        else:
            text = (
                f"{len(short)} classes have fewer than {shots} images to train on, repeated to "
                f"{shots} shots; fewest: class {name} has {number}"
            )
        warnings.warn(text, stacklevel=3)
    return most


def _policy(data: DataConfig) -> OnBad:
    """Returns what is done with a bad sample where nothing counts them."""

    def refuse(bad: BadSample) -> None:
        if not data.max_bad:
            raise VlkrError(f"{bad}; max_bad lets such samples be skipped")

    return refuse


@dataclass(frozen=True)
class DrawnSplit:
    """The training and validation images of a run.

    Attributes:
        split: the samples, with their images if those fit into memory.
        pool: source of the training samples, and of the validation samples without ``own_val``.
        own_val: the dataset's own validation split, used in place of a drawn one.
        counts: training samples in each shard of the pool, shuffled by hash, if streamed.
    """

    split: FewShotSplit
    pool: Source
    own_val: Source | None
    counts: list[int]

    @property
    def train_keys(self) -> Counter[str]:
        """How often each sample is trained on, by key."""
        return Counter(sample.key for sample in self.split.train)


def draw_split(
    dataset: Dataset, data: DataConfig, seed: int, on_bad: OnBad | None = None
) -> DrawnSplit:
    """Draws the training and validation images of a run, or takes them from its split file.

    Args:
        dataset: with a ``train`` split.
        data: shots, fractions and split file.
        seed: random seed of the split.
        on_bad: called with each sample that cannot be used; by default it raises, or with
            ``max_bad`` such samples are skipped.

    Raises:
        VlkrError: if a class is empty, a number is out of range, or the split file does not match.
    """
    on_bad = on_bad or _policy(data)
    pool, own_val = dataset.source("train"), dataset.splits.get("val")
    file = None if data.split_file is None else read_split(Path(data.split_file))
    if file is not None and file.picks["val"]:
        pool = pool if own_val is None else Joined([pool, own_val])
        own_val = None
    max_bytes = data.memory_gb * 1e9
    samples = _Counted(pool, on_bad)
    if file is not None:
        split = take_split(samples, file, dataset.class_names, max_bytes=max_bytes)
    else:
        split = few_shot_split(
            samples,
            dataset.class_names,
            data.shots,
            seed,
            fraction=data.fraction,
            val_fraction=data.val_fraction,
            per_domain=data.per_domain,
            max_bytes=max_bytes,
        )
    keys = Counter(sample.key for sample in split.train)
    return DrawnSplit(split, pool, own_val, samples.counts(split.positions or {}, keys))


def validation_source(dataset: Dataset, data: DataConfig, seed: int) -> Source | None:
    """Returns the usable images that a run validates with; None if there are none."""
    drawn = draw_split(dataset, data, seed)
    if drawn.own_val is not None and not data.max_bad:
        return drawn.own_val
    source = drawn.own_val or View(drawn.pool, times=Counter(s.key for s in drawn.split.val))
    usable = Counter(
        sample.key
        for sample in good_samples(source, _policy(data))
        if not data.max_bad or not isinstance(decode_image(sample), BadSample)
    )
    return View(drawn.own_val or drawn.pool, times=usable) if usable else None


class _Counted:
    """Yields a source's usable samples shard by shard and records where each shard ends."""

    def __init__(self, source: Source, on_bad: OnBad) -> None:
        self.shards = shuffled_by_hash(source).shards()
        self.on_bad = on_bad
        self.ends: list[int] = []

    def __iter__(self) -> Iterator[Sample]:
        number = 0
        for shard in self.shards:
            for sample in good_samples(shard, self.on_bad):
                number += 1
                yield sample
            self.ends.append(number)

    def counts(self, positions: Mapping[str, int], times: Mapping[str, int]) -> list[int]:
        """Returns how many picked samples each shard has."""
        counts = [0] * len(self.ends)
        for key, number in times.items():
            if key in positions:
                counts[bisect_right(self.ends, positions[key])] += number
        return counts
