import pytest
import torch
from helpers import write_images
from torchvision.transforms import v2

from vlkr.datasets import DataOptions, FewShotDataModule
from vlkr.datasets.few_shot import few_shot_split


def make(options, seed=1):
    transform = v2.functional.pil_to_tensor
    return FewShotDataModule(options.load(), options, seed, transform, transform)


def test_images_are_those_of_the_split(tmp_path):
    options = DataOptions(root=write_images(tmp_path / "d", per_class=20), shots=3, batch_size=4)
    dataset = options.load()
    data = make(options)
    split = few_shot_split(dataset.source("train"), dataset.class_names, 3, seed=1)
    assert data.train_images.keys == [s.key for s in split.train]
    assert data.val_images.keys == [s.key for s in split.val]
    test = {s.key for s in dataset.source("test")}
    assert not test & {*data.train_images.keys, *data.val_images.keys}


def test_own_validation_split_is_used_whole(tmp_path):
    root = write_images(tmp_path / "d", per_class=5, splits=("train", "val", "test"))
    data = make(DataOptions(root=root, shots=2))
    (batch,) = data.val_dataloader()
    assert len(batch.keys) == 15
    assert torch.equal(batch.labels, torch.arange(3).repeat_interleave(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(tmp_path, workers):
    root = write_images(tmp_path / "d", per_class=12)
    options = DataOptions(root=root, shots=2, batch_size=4, min_steps_per_epoch=3)
    expected = list(make(options).train_dataloader())
    loader = make(
        DataOptions(root=root, shots=2, batch_size=4, min_steps_per_epoch=3, num_workers=workers)
    ).train_dataloader()
    batches = list(loader)
    assert [b.keys for b in batches] == [b.keys for b in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, expected, strict=True))
    assert [len(b.keys) for b in batches] == [4, 4, 4]


def test_no_validation_when_every_class_is_short(tmp_path):
    root = write_images(tmp_path / "d", per_class=2, splits=("train", "test"))
    data = make(DataOptions(root=root, shots=2))
    assert data.val_dataloader() == []
