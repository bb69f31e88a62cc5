from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from vlkr.datasets.epochs import FewShotImages, MemoryBatches, MemoryPlan, TrainLoader
from vlkr.datasets.loading import (
    BadSamples,
    Batch,
    PixelTransform,
    TrainTransform,
    Transform,
    collate,
    evaluation_loader,
    without_normalization,
)
from vlkr.datasets.options import DataConfig
from vlkr.datasets.registry import Dataset
from vlkr.datasets.samples import Sample, Source, View, good_samples, shuffled_by_hash
from vlkr.datasets.split_files import FewShotSplit, write_split
from vlkr.datasets.splits import draw_split
from vlkr.datasets.streaming import EpochPlan, StreamedBatches
from vlkr.runtime import rank, world_size


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
        options: DataConfig,
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
        drawn = draw_split(dataset, options, seed, self.bad.add)
        split, self.pool, own_val = drawn.split, drawn.pool, drawn.own_val
        max_bytes = options.memory_gb * 1e9
        self.train_keys = drawn.train_keys
        self.counts = drawn.counts
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
            return None, View(self.pool, times=keys) if keys else None
        samples: list[Sample] = [] if own is not None else list(split.val)
        held = 0
        for sample in good_samples(own or (), self.bad.add):
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
        steps = own.batch_size, own.min_steps_per_epoch, processes, self.seed
        batches: MemoryBatches | StreamedBatches
        if self.train_images is not None:
            plan = MemoryPlan(len(self.train_images), *steps)
            batches = MemoryBatches(self.train_images, plan)
        else:
            source = View(shuffled_by_hash(self.pool), times=self.train_keys)
            stream = EpochPlan(self.counts, *steps, own.shuffle_buffer)
            batches = StreamedBatches(source, stream, self.train_transform, self.bad)
        return TrainLoader(batches, rank, self.bad, own.num_workers)

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
        return (trainer.global_rank, trainer.world_size) if trainer else (rank(), world_size())


def _without_images(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, image=b"") for sample in samples]
