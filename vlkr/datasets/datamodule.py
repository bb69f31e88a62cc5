from __future__ import annotations

import importlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader

from vlkr.datasets.few_shot import FewShotSplit, few_shot_split
from vlkr.datasets.pipelines import (
    BadSamples,
    Batch,
    EpochSampler,
    FewShotImages,
    collate,
    evaluation_loader,
)
from vlkr.datasets.registry import Dataset, described, load_dataset
from vlkr.datasets.sharing import JoinedSource, mixed, process_place
from vlkr.datasets.sources import Sample, Source, skip_bad
from vlkr.datasets.splits import half_of_classes, read_split, take_split, write_split
from vlkr.datasets.streaming import (
    BatchOrder,
    EpochPlan,
    PickedSource,
    StreamedBatches,
    TrainLoader,
)
from vlkr.datasets.transforms import (
    PixelTransform,
    TrainTransform,
    Transform,
    without_normalization,
)
from vlkr.errors import VlkrError
from vlkr.files import resource


@dataclass(frozen=True)
class DataOptions:
    """The data of a run.

    Args:
        name: a card's name, such as ``digits``, one of CLIP_benchmark's, or a URL of shards.
        root: a folder of images per class (``<class>/*``, ``<domain>/<class>/*``, either below
            ``<split>/``) or of webdataset shards, or a table of images. With ``name``, the data of
            that card.
        shots: training images a class.
        templates: prompts with the placeholder ``{c}``, the name of one of the card's sets,
            ``imagenet80``, ``imagenet7``, or a file with a prompt a line; none takes the dataset's
            own.
        test_fraction: of a folder without splits, the part held out for testing.
        batch_size: images a step.
        min_steps_per_epoch: few images are oversampled to at least this many steps an epoch.
        num_workers: processes that decode and augment; 0 does it in the main one.
        crop_scale: smallest and largest area of the random crop, relative to the image.
        flip: flip half of the training images horizontally.
        classes_per_step: with more classes than these a training step uses the batch's and random
            others; none uses all.
        domains: train, validate and test on these domains only; none takes all.
        classes: the ``base`` half of the classes (the first ``ceil(n / 2)``), the ``new`` half, or
            ``all``.
        fraction: of each class's images to train on, in place of ``shots``.
        val_fraction: of each class's images in each domain that are set aside for validation, in
            place of ``min(shots, 4)`` a class; 0.2 in DomainBed.
        per_domain: draw the shots, or the fraction, from each class in each domain.
        split_file: the images to train on and to validate with: the ``split.jsonl`` of a run, or
            CoOp's ``split_zhou_*.json``. Nothing is drawn.
        max_bad: images that cannot be used are skipped and counted, up to so many.
        memory_gb: of images kept, in 10^9 bytes: decoded if they fit, else encoded if these fit;
            else they are streamed.
        shuffle_buffer: while streaming, the number of images from which the next one is drawn.
        allow_commands: let the data's place be ``pipe:COMMAND``.
    """

    name: str | None = None
    root: Path | None = None
    shots: int = 16
    templates: list[str] | None = None
    test_fraction: float = 0.5
    batch_size: int = 32
    min_steps_per_epoch: int = 10
    num_workers: int = 0
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    classes_per_step: int | None = None
    domains: list[str] | None = None
    classes: Literal["all", "base", "new"] = "all"
    fraction: float | None = None
    val_fraction: float | None = None
    per_domain: bool = False
    split_file: str | None = None
    max_bad: int = 0
    memory_gb: float = 4.0
    shuffle_buffer: int = 1024
    allow_commands: bool = False

    def context(self) -> dict[str, Any]:
        """Which images are trained on, for captions; None for what is as usual."""
        return {
            "shots": self.shots if self.fraction is None and self.split_file is None else None,
            "fraction": self.fraction,
            "split file": self.split_file,
            "classes": None if self.classes == "all" else self.classes,
            "domains": None if self.domains is None else " ".join(self.domains),
        }

    def absolute(self) -> DataOptions:
        """The same data, by paths that hold from any working folder."""
        templates = self.templates
        if templates is not None:
            # Only vlkr.models knows which of them are names of sets.
            models = importlib.import_module("vlkr.models.templates")
            templates = models.absolute_templates(templates)
        name, _, place = (self.name or "").partition("=")
        named = f"{name}={Path(place).resolve()}" if place and Path(place).exists() else self.name
        root = None if self.root is None else Path(self.root).resolve()
        split = None if self.split_file is None else str(Path(self.split_file).resolve())
        return replace(self, name=named, root=root, split_file=split, templates=templates)

    def described(self) -> Dataset | None:
        """What the dataset's card tells without the data; None if it tells too little.

        Raises:
            VlkrError: for domains that the card does not know.
        """
        if self.name is None:
            return None
        name = self.name.partition("=")[0]
        dataset = described(name, self.test_fraction, self.domains)
        if dataset is None or self.classes == "all":
            return dataset
        return half_of_classes(dataset, self.classes)

    def load(self) -> Dataset:
        """Finds the dataset.

        Raises:
            VlkrError: if neither ``name`` nor ``root`` is given, a number is out of range, or the
                dataset is not found.
        """
        if self.name is None and self.root is None:
            raise VlkrError("no dataset: give --data.name CARD or --data.root FOLDER")
        is_card = resource(f"data/{self.name}.yaml").is_file()
        if self.name is not None and not is_card and Path(self.name).is_dir():
            raise VlkrError(f"data.name {self.name} is a folder; give it as --data.root")
        if self.name is not None and self.root is not None and not is_card:
            raise VlkrError(f"data.name {self.name} is no card, as it must be beside data.root")
        if self.root is not None and not self.root.exists():
            raise VlkrError(f"no folder at data root {self.root}")
        for option, least in (
            ("shots", 1),
            ("batch_size", 1),
            ("min_steps_per_epoch", 1),
            ("num_workers", 0),
            ("classes_per_step", 2),
            ("max_bad", 0),
            ("memory_gb", 0),
            ("shuffle_buffer", 1),
        ):
            if getattr(self, option) is not None and getattr(self, option) < least:
                raise VlkrError(
                    f"data.{option} {getattr(self, option)} is too small, expected at least {least}"
                )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise VlkrError(
                f"data.crop_scale {low}, {high} is out of range, expected 0 < low <= high <= 1"
            )
        if self.split_file is not None:
            read_split(Path(self.split_file))
        dataset = load_dataset(
            self._reference(),
            templates=self.templates,
            test_fraction=self.test_fraction,
            allow_commands=self.allow_commands,
        )
        if self.domains is not None:
            dataset = dataset.only(self.domains)
        return dataset if self.classes == "all" else half_of_classes(dataset, self.classes)

    def _reference(self) -> str | Path:
        if self.name is not None and self.root is not None:
            return f"{self.name}={self.root}"
        return self.root or str(self.name)


class FewShotDataModule(L.LightningDataModule):
    """Training and validation images of a dataset: kept in memory if they fit, else streamed.

    Args:
        dataset: with a ``train`` split.
        options: shots, batches and workers.
        seed: of the split, the order and the augmentation.
        train_transform: of 8-bit tensors, with augmentation; or PIL image to tensor.
        transform: PIL image to tensor, without.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: DataOptions,
        seed: int,
        train_transform: TrainTransform | Transform,
        transform: Transform,
    ) -> None:
        super().__init__()
        # Few images may leave a process without one to validate with.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.dataset = dataset
        self.options = options
        self.seed = seed
        self.train_transform = train_transform
        self.transform = without_normalization(transform)
        self.bad = BadSamples(options.max_bad)
        self.pool: Source = dataset.source("train")
        own_val = dataset.splits.get("val")
        file = None if options.split_file is None else read_split(Path(options.split_file))
        if file is not None and file.picks["val"]:
            self.pool = self.pool if own_val is None else JoinedSource([self.pool, own_val])
            own_val = None
        max_bytes = options.memory_gb * 1e9
        samples = _Counted(self.pool, self.bad)
        split = (
            few_shot_split(
                samples,
                dataset.class_names,
                options.shots,
                seed,
                fraction=options.fraction,
                val_fraction=options.val_fraction,
                per_domain=options.per_domain,
                max_bytes=max_bytes,
            )
            if file is None
            else take_split(samples, file, dataset.class_names, max_bytes=max_bytes)
        )
        self.train_keys = Counter(sample.key for sample in split.train)
        self.counts = samples.counts(split.positions or {}, self.train_keys)
        self.train_images: FewShotImages | None = None
        if split.positions is None:
            self.train_images = FewShotImages(split.train, train_transform, max_bytes, self.bad)
            max_bytes -= self.train_images.nbytes
        self.val_images, self.val_source = self._val(split, own_val, max_bytes)
        self.split = FewShotSplit(_without_images(split.train), _without_images(split.val))
        self.bad.warn()

    def _val(
        self, split: FewShotSplit, own: Source | None, max_bytes: float
    ) -> tuple[FewShotImages | None, Source | None]:
        """The images to validate with, or a source of them if they are too many."""
        if own is None and split.positions is not None:
            keys = Counter(sample.key for sample in split.val)
            return None, PickedSource(self.pool, keys) if keys else None
        samples: list[Sample] = [] if own is not None else list(split.val)
        held = 0
        for sample in skip_bad(own or (), self.bad.add):
            samples.append(sample)
            held += len(sample.image)
            if held > max_bytes:
                return None, own
        return FewShotImages(samples, self.transform, max_bytes, self.bad), None

    def save_split(self, path: Path) -> None:
        """Writes the split as JSON Lines, to be given back as ``split_file``."""
        own = self.options
        how: dict[str, Any] = {"dataset": self.dataset.name, "seed": self.seed}
        how |= {"shots": own.shots} if own.fraction is None else {"fraction": own.fraction}
        how |= {"val_fraction": own.val_fraction, "per_domain": own.per_domain}
        how |= {"classes": own.classes, "domains": own.domains, "split_file": own.split_file}
        write_split(path, self.split, self.dataset.class_names, how)

    def train_dataloader(self) -> TrainLoader:
        """Whole batches, oversampled to ``min_steps_per_epoch``; true epochs of a stream."""
        rank, processes = self._place()
        own = self.options
        workers: dict[str, Any] = {
            "num_workers": own.num_workers,
            "persistent_workers": own.num_workers > 0,
        }
        if self.train_images is not None:
            order = EpochSampler(
                len(self.train_images),
                own.batch_size,
                own.min_steps_per_epoch,
                self.seed,
                rank,
                processes,
            )
            workers |= {"batch_size": own.batch_size, "collate_fn": collate}
            return TrainLoader(self.train_images, order, self.bad, **workers)
        plan = EpochPlan(
            self.counts,
            own.batch_size,
            own.min_steps_per_epoch,
            processes,
            self.seed,
            own.shuffle_buffer,
        )
        source = PickedSource(mixed(self.pool), self.train_keys)
        batches = StreamedBatches(source, plan, self.train_transform, self.bad)
        return TrainLoader(batches, BatchOrder(plan, rank), self.bad, batch_size=None, **workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation images once over all processes; none when every class is short."""
        own = self.options
        if self.val_source is not None:
            return evaluation_loader(
                self.val_source,
                self.transform,
                own.batch_size,
                own.num_workers,
                max_bad=own.max_bad,
            )
        if not self.val_images:
            return []
        rank, processes = self._place()
        return DataLoader[Any](
            self.val_images,
            batch_size=own.batch_size,
            sampler=[(i, 0) for i in range(rank, len(self.val_images), processes)],
            num_workers=own.num_workers,
            collate_fn=collate,
            persistent_workers=own.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalises 8-bit images on the model's device."""
        trainer = self.trainer
        transform = self.train_transform if trainer and trainer.training else self.transform
        if isinstance(transform, (TrainTransform, PixelTransform)):
            return batch._replace(images=transform.normalize(batch.images))
        return batch

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else process_place()


class _Counted:
    """The samples of a source, shard by shard, with a note of where each shard ends."""

    def __init__(self, source: Source, bad: BadSamples) -> None:
        self.shards = mixed(source).shards()
        self.bad = bad
        self.ends: list[int] = []

    def __iter__(self) -> Iterator[Sample]:
        number = 0
        for shard in self.shards:
            for sample in skip_bad(shard, self.bad.add):
                number += 1
                yield sample
            self.ends.append(number)

    def counts(self, positions: Mapping[str, int], times: Mapping[str, int]) -> list[int]:
        """How many picked samples each shard has."""
        counts = [0] * len(self.ends)
        for key, number in times.items():
            if key in positions:
                counts[bisect_right(self.ends, positions[key])] += number
        return counts


def _without_images(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, image=b"") for sample in samples]
