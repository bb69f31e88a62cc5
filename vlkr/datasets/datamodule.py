from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from vlkr.datasets.few_shot import few_shot_split
from vlkr.datasets.pipelines import Batch, EpochSampler, FewShotImages, Transform, collate
from vlkr.datasets.registry import Dataset, load_dataset
from vlkr.errors import VlkrError
from vlkr.files import resource


@dataclass(frozen=True)
class DataOptions:
    """The data of a run.

    Args:
        name: a card's name, such as ``digits``. Leave it out when ``root`` is given.
        root: a folder of images per class (``<class>/*`` or ``<split>/<class>/*``), or of
            webdataset shards.
        shots: training images a class.
        templates: prompts with the placeholder ``{c}``; none takes the dataset's own.
        test_fraction: of a folder without splits, the part held out for testing.
        batch_size: images a step.
        min_steps_per_epoch: few images are oversampled to at least this many steps an epoch.
        num_workers: processes that decode and augment; 0 does it in the main one.
        crop_scale: smallest and largest area of the random crop, relative to the image.
        flip: flip half of the training images horizontally.
        classes_per_step: with more classes than these a training step uses the batch's and random
            others; none uses all.
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

    def load(self) -> Dataset:
        """Finds the dataset.

        Raises:
            VlkrError: if neither or both of ``name`` and ``root`` are given, a number is out of
                range, or the dataset is not found.
        """
        if self.name is None and self.root is None:
            raise VlkrError("no dataset: give --data.name CARD or --data.root FOLDER")
        if self.name is not None and self.root is not None:
            raise VlkrError(
                f"two datasets, --data.name {self.name} and --data.root {self.root}: drop one "
                "(--data.name null where a configuration names it)"
            )
        is_card = resource(f"data/{self.name}.yaml").is_file()
        if self.name is not None and not is_card and Path(self.name).is_dir():
            raise VlkrError(f"data.name {self.name} is a folder; give it as --data.root")
        if self.root is not None and not self.root.is_dir():
            raise VlkrError(f"no folder at data root {self.root}")
        for option, least in (
            ("shots", 1),
            ("batch_size", 1),
            ("min_steps_per_epoch", 1),
            ("num_workers", 0),
            ("classes_per_step", 2),
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
        return load_dataset(
            self.root or str(self.name),
            templates=None if self.templates is None else tuple(self.templates),
            test_fraction=self.test_fraction,
        )


class FewShotDataModule(L.LightningDataModule):
    """Few training and validation images of a dataset, kept in memory.

    Args:
        dataset: with a ``train`` split.
        options: shots, batches and workers.
        seed: of the split, the order and the augmentation.
        train_transform: PIL image to tensor, with augmentation.
        transform: the same without.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: DataOptions,
        seed: int,
        train_transform: Transform,
        transform: Transform,
    ) -> None:
        super().__init__()
        self.options = options
        self.seed = seed
        split = few_shot_split(dataset.source("train"), dataset.class_names, options.shots, seed)
        own_val = list(dataset.splits["val"]) if "val" in dataset.splits else []
        self.train_images = FewShotImages(split.train, train_transform)
        self.val_images = FewShotImages(own_val or split.val, transform)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Whole batches, oversampled to ``min_steps_per_epoch``."""
        trainer = self.trainer
        sampler = EpochSampler(
            len(self.train_images),
            self.options.batch_size,
            self.options.min_steps_per_epoch,
            self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return self._loader(self.train_images, sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation images once; none when every class is short of images."""
        if not len(self.val_images):
            return []
        return self._loader(self.val_images, [(i, 0) for i in range(len(self.val_images))])

    def _loader(
        self, images: FewShotImages, sampler: EpochSampler | list[tuple[int, int]]
    ) -> DataLoader[Batch]:
        workers = self.options.num_workers
        return DataLoader[Any](
            images,
            batch_size=self.options.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
        )
