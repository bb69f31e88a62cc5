"""The data options of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vlkr.datasets.prompts import absolute_templates
from vlkr.datasets.registry import Dataset, describe_dataset, load_dataset
from vlkr.datasets.split_files import read_split
from vlkr.errors import VlkrError
from vlkr.files import resource
from vlkr.validation import check_ranges

_AtLeastOne = Annotated[int, Field(ge=1)]
_AtLeastZero = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Args:
        name: a card's name, such as ``digits``, one of CLIP_benchmark's, or a URL of shards.
        root: a folder of images per class (``<class>/*``, ``<domain>/<class>/*``, either below
            ``<split>/``) or of webdataset shards, or a table of images. With ``name``, the data of
            that card.
        shots: training images per class.
        templates: prompts with the placeholder ``{c}``, the name of one of the card's sets,
            ``imagenet80``, ``imagenet7``, or a file with one prompt per line; the dataset's own
            by default.
        test_fraction: fraction of images held out for testing if the data has no splits.
        batch_size: images per step and device.
        min_steps_per_epoch: few images are oversampled to at least this many steps per epoch.
        num_workers: processes that decode and augment; 0 for the main process.
        crop_scale: smallest and largest area of the random crop, relative to the image.
        flip: flip half of the training images horizontally.
        classes_per_step: maximum classes per training step: the batch's plus randomly sampled
            others; all by default.
        domains: train, validate and test on these domains only; all by default.
        classes: the ``base`` half of the classes (the first ``ceil(n / 2)``), the ``new`` half, or
            ``all``.
        fraction: fraction of each class's images to train on, in place of ``shots``.
        val_fraction: fraction of each class's images in each domain held out for validation, in
            place of ``min(shots, 4)`` per class; 0.2 in DomainBed.
        per_domain: draw the shots, or the fraction, from each class in each domain.
        split_file: the images to train on and to validate with: the ``split.jsonl`` of a run, or
            CoOp's ``split_zhou_*.json``. Nothing is drawn.
        max_bad: maximum number of invalid images to skip before failing.
        memory_gb: memory for images in 10^9 bytes: kept decoded if they fit, else encoded, else
            streamed.
        shuffle_buffer: while streaming, the number of images that the next one is drawn from.
        allow_commands: allow the source ``pipe:COMMAND``.
    """

    name: str | None = None
    root: Path | None = None
    shots: _AtLeastOne = 16
    templates: list[str] | None = None
    test_fraction: float = 0.5
    batch_size: _AtLeastOne = 32
    min_steps_per_epoch: _AtLeastOne = 10
    num_workers: _AtLeastZero = 0
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    classes_per_step: Annotated[int, Field(ge=2)] | None = None
    domains: list[str] | None = None
    classes: Literal["all", "base", "new"] = "all"
    fraction: float | None = None
    val_fraction: float | None = None
    per_domain: bool = False
    split_file: str | None = None
    max_bad: _AtLeastZero = 0
    memory_gb: Annotated[float, Field(ge=0)] = 4.0
    shuffle_buffer: _AtLeastOne = 1024
    allow_commands: bool = False

    @property
    def label(self) -> str:
        """The dataset's name without its location."""
        if self.name is None:
            return "" if self.root is None else self.root.name
        card = self.name.partition("=")[0]
        return card if resource(f"data/{card}.yaml").is_file() else self.name

    def context(self) -> dict[str, Any]:
        """Returns which images are trained on, for captions; None for a default."""
        return {
            "shots": self.shots if self.fraction is None and self.split_file is None else None,
            "fraction": self.fraction,
            "split file": self.split_file,
            "classes": None if self.classes == "all" else self.classes,
            "domains": None if self.domains is None else " ".join(self.domains),
        }

    def absolute(self) -> DataConfig:
        """Returns the same options with absolute paths."""
        templates = self.templates
        if templates is not None:
            templates = absolute_templates(templates)
        name, _, place = (self.name or "").partition("=")
        named = f"{name}={Path(place).resolve()}" if place and Path(place).exists() else self.name
        root = None if self.root is None else Path(self.root).resolve()
        split = None if self.split_file is None else str(Path(self.split_file).resolve())
        return replace(self, name=named, root=root, split_file=split, templates=templates)

    def described(self) -> Dataset | None:
        """Returns what the dataset's card says without the data; None if it says too little.

        Raises:
            VlkrError: for domains that the card does not know.
        """
        if self.name is None:
            return None
        name = self.name.partition("=")[0]
        dataset = describe_dataset(name, self.test_fraction, self.domains)
        return dataset and dataset.select(classes=self.classes)

    def load(self) -> Dataset:
        """Loads the dataset.

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
            raise VlkrError(f"data.name {self.name} is not a card, as it must be next to data.root")
        if self.root is not None and not self.root.exists():
            raise VlkrError(f"no folder at data root {self.root}")
        check_ranges(self, "data")
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
        return dataset.select(domains=self.domains, classes=self.classes)

    def _reference(self) -> str | Path:
        if self.name is not None and self.root is not None:
            return f"{self.name}={self.root}"
        return self.root or str(self.name)
