"""Datasets: where images and labels come from, few-shot splits, and batches."""

from vlkr.datasets.datamodule import DataOptions, FewShotDataModule
from vlkr.datasets.few_shot import FewShotSplit, few_shot_split
from vlkr.datasets.registry import Dataset, load_dataset
from vlkr.datasets.shards import ShardSource
from vlkr.datasets.sources import FileSource, Sample, Source

__all__ = [
    "DataOptions",
    "Dataset",
    "FewShotDataModule",
    "FewShotSplit",
    "FileSource",
    "Sample",
    "ShardSource",
    "Source",
    "few_shot_split",
    "load_dataset",
]
