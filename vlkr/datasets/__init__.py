"""Datasets: where images and labels come from, few-shot splits, and batches."""

from __future__ import annotations

from vlkr.datasets.options import DataConfig
from vlkr.datasets.registry import Dataset, load_dataset
from vlkr.datasets.samples import BadSample, FileSource, Sample, Source, View
from vlkr.datasets.shards import ShardSource
from vlkr.datasets.split_files import FewShotSplit
from vlkr.datasets.splits import few_shot_split

__all__ = [
    "BadSample",
    "DataConfig",
    "Dataset",
    "FewShotSplit",
    "FileSource",
    "Sample",
    "ShardSource",
    "Source",
    "View",
    "few_shot_split",
    "load_dataset",
]
