"""Datasets: where images and labels come from, few-shot splits, and batches.

``FewShotDataModule`` is imported at its first use, for it imports Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlkr.datasets.options import DataConfig
from vlkr.datasets.registry import Dataset, load_dataset
from vlkr.datasets.samples import BadSample, FileSource, Sample, Source, View
from vlkr.datasets.shards import ShardSource
from vlkr.datasets.split_files import FewShotSplit
from vlkr.datasets.splits import few_shot_split

if TYPE_CHECKING:
    from vlkr.datasets.training import FewShotDataModule

__all__ = [
    "BadSample",
    "DataConfig",
    "Dataset",
    "FewShotDataModule",
    "FewShotSplit",
    "FileSource",
    "Sample",
    "ShardSource",
    "Source",
    "View",
    "few_shot_split",
    "load_dataset",
]


def __getattr__(name: str) -> Any:
    if name == "FewShotDataModule":
        return importlib.import_module("vlkr.datasets.training").FewShotDataModule
    raise AttributeError(f"module 'vlkr.datasets' has no attribute {name!r}")
