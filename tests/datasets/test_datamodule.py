import json
from collections import Counter
from dataclasses import replace
from unittest import mock

import lightning as L
import pytest
import torch
from helpers import COLORS, color_image, write_images, write_shards
from open_clip.transform import image_transform
from torchvision.transforms import v2

from vlkr.datasets import DataConfig
from vlkr.datasets.epochs import MemoryBatches
from vlkr.datasets.images import decode_image
from vlkr.datasets.loading import TrainTransform
from vlkr.datasets.splits import few_shot_split
from vlkr.datasets.streaming import StreamedBatches
from vlkr.datasets.training import FewShotDataModule
from vlkr.errors import VlkrError
from vlkr.training.trainer import quiet_lightning

AUGMENT = TrainTransform((8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bilinear", (0.5, 1), True)
pixels = v2.functional.pil_to_tensor


def make(options, seed=1, train_transform=pixels):
    return FewShotDataModule(options.load(), options, seed, train_transform, pixels)


def keys_of(loader):
    return [key for batch in loader for key in batch.keys]


@pytest.fixture
def domains(tmp_path):
    """``<domain>/<class>/*`` with twelve images each."""
    for d, domain in enumerate(("art", "photo")):
        for c, name in enumerate(COLORS):
            folder = tmp_path / "tree" / domain / name
            folder.mkdir(parents=True)
            for i in range(12):
                image = color_image(name, 10_000 * d + 100 * c + i)
                (folder / f"{i}.png").write_bytes(image)
    return tmp_path / "tree"


def test_images_are_those_of_the_split(tmp_path):
    options = DataConfig(root=write_images(tmp_path / "d", per_class=20), shots=3, batch_size=4)
    dataset = options.load()
    data = make(options)
    split = few_shot_split(dataset.source("train"), dataset.class_names, 3, seed=1)
    assert data.train_images.keys == [s.key for s in split.train]
    assert data.val_images.keys == [s.key for s in split.val]
    test = {s.key for s in dataset.source("test")}
    assert not test & {*data.train_images.keys, *data.val_images.keys}


def test_own_validation_split_is_used_whole(tmp_path):
    root = write_images(tmp_path / "d", per_class=5, splits=("train", "val", "test"))
    data = make(DataConfig(root=root, shots=2))
    (batch,) = data.val_dataloader()
    assert len(batch.keys) == 15
    assert torch.equal(batch.labels, torch.arange(3).repeat_interleave(5))


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(tmp_path, workers, memory_gb):
    root = write_images(tmp_path / "d", per_class=12)
    options = DataConfig(
        root=root, shots=2, batch_size=4, min_steps_per_epoch=3, memory_gb=memory_gb
    )
    expected = list(make(options).train_dataloader())
    batches = list(make(replace(options, num_workers=workers)).train_dataloader())
    assert [b.keys for b in batches] == [b.keys for b in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, expected, strict=True))
    assert [len(b.keys) for b in batches] == [4, 4, 4]


def test_no_validation_when_every_class_is_short(tmp_path):
    root = write_images(tmp_path / "d", per_class=2, splits=("train", "test"))
    data = make(DataConfig(root=root, shots=2))
    assert data.val_dataloader() == []
    assert make(DataConfig(root=root, shots=2, memory_gb=0)).val_dataloader() == []


# What does not fit is streamed


@pytest.mark.parametrize("write", [write_images, write_shards])
def test_a_stream_has_the_samples_of_memory(tmp_path, write):
    root = write(tmp_path / "d", per_class=24)
    options = DataConfig(root=root, shots=8, batch_size=5, min_steps_per_epoch=1)
    few, streamed = make(options), make(replace(options, memory_gb=0))
    assert isinstance(few.train_dataloader().dataset, MemoryBatches)
    loader = streamed.train_dataloader()
    assert isinstance(loader.dataset, StreamedBatches)
    assert streamed.train_images is None
    assert sorted(keys_of(loader)) == sorted(few.train_images.keys)
    assert sorted(keys_of(streamed.val_dataloader())) == sorted(few.val_images.keys)
    assert len(loader) == len(few.train_dataloader()) == 5


def test_images_that_fit_encoded_only_are_decoded_at_use(tmp_path):
    root = write_images(tmp_path / "d", per_class=24)
    options = DataConfig(root=root, shots=8, batch_size=5)
    whole = make(options)
    encoded = sum(
        len(s.image)
        for s in few_shot_split(
            whole.dataset.source("train"), whole.dataset.class_names, 8, 1
        ).train
    )
    # 20x20 pixels of noise take more as PNG than decoded.
    assert whole.train_images.nbytes == 24 * 20 * 20 * 3 < encoded
    with mock.patch("vlkr.datasets.epochs.to_tensor", return_value=torch.zeros(3, 999, 999)):
        data = make(replace(options, memory_gb=2 * encoded / 1e9))
    assert data.train_images.images is None
    assert keys_of(data.train_dataloader()) == keys_of(whole.train_dataloader())


def test_short_classes_are_repeated_in_a_stream(tmp_path):
    root = write_images(tmp_path / "d", per_class=6, splits=("train", "test"))
    for i in range(2, 6):
        (root / "train" / "red" / f"{i}.png").unlink()
    options = DataConfig(
        root=root, shots=4, batch_size=4, min_steps_per_epoch=1, memory_gb=0, shuffle_buffer=4
    )
    with pytest.warns(UserWarning, match="'red' has 2 images to train on, repeated to 4 shots"):
        data = make(options)
    counts = Counter(keys_of(data.train_dataloader()))
    assert [counts[f"red/{i}.png"] for i in range(2)] == [2, 2]
    assert sorted(counts.values()) == [1] * 8 + [2, 2]


def test_a_large_validation_split_is_streamed(tmp_path):
    root = write_images(tmp_path / "d", per_class=5, splits=("train", "val", "test"))
    data = make(DataConfig(root=root, shots=2, memory_gb=0))
    assert data.val_images is None
    assert sorted(keys_of(data.val_dataloader())) == sorted(
        s.key for s in data.dataset.source("val")
    )


def test_all_of_a_dataset_by_fraction(tmp_path):
    options = DataConfig(root=write_images(tmp_path / "d"), fraction=1.0, memory_gb=0)
    data = make(options)
    train = sorted(s.key for s in data.dataset.source("train"))
    assert sorted(data.train_keys) == train
    assert data.val_dataloader() == []


# Which images


def test_domains_and_halves_of_classes(domains):
    data = make(DataConfig(root=domains, shots=2, domains=["photo"]))
    assert {key.split("/")[0] for key in data.train_images.keys} == {"photo"}
    assert {s.domain for s in data.dataset.source("test")} == {"photo"}
    with pytest.raises(VlkrError, match="has no domain 'sketch'; it has art, photo"):
        DataConfig(root=domains, domains=["sketch"]).load()
    base = make(DataConfig(root=domains, shots=2, classes="base"))
    assert base.dataset.class_names == ("blue", "green")
    assert {s.label for s in base.dataset.source("test")} == {0, 1}


def test_shots_of_each_domain_and_held_out_fractions(domains):
    data = make(DataConfig(root=domains, shots=2, per_domain=True))
    cells = Counter((s.label, s.domain) for s in data.split.train)
    assert set(cells.values()) == {2}
    assert len(cells) == 6
    data = make(DataConfig(root=domains, fraction=1.0, val_fraction=0.2))
    train = Counter((s.label, s.domain) for s in data.dataset.source("train"))
    held_out = Counter((s.label, s.domain) for s in data.split.val)
    assert held_out == {cell: round(0.2 * number) for cell, number in train.items()}


def test_a_saved_split_is_given_back(tmp_path, domains):
    options = DataConfig(root=domains, shots=3, batch_size=4)
    data = make(options, seed=7)
    data.save_split(tmp_path / "split.jsonl")
    header = json.loads((tmp_path / "split.jsonl").read_text().splitlines()[0])
    assert (header["dataset"], header["seed"], header["shots"]) == ("tree", 7, 3)
    for memory_gb in (1.0, 0.0):
        file = str(tmp_path / "split.jsonl")
        again = make(replace(options, shots=9, split_file=file, memory_gb=memory_gb), seed=2)
        assert again.split == data.split
    again.save_split(tmp_path / "again.jsonl")
    lines = [(tmp_path / name).read_text().splitlines() for name in ("split.jsonl", "again.jsonl")]
    assert lines[0][1:] == lines[1][1:]


def test_a_split_file_may_validate_with_the_own_split(tmp_path):
    root = write_images(tmp_path / "d", per_class=5, splits=("train", "val", "test"))
    for split in ("train", "val"):  # other names, for keys are told apart by them
        for path in [*(root / split).rglob("*.png")]:
            path.rename(path.with_name(f"{split}-{path.name}"))
    coop = {
        part: [[f"{c}/{part}-1.png", i, c] for i, c in enumerate(sorted(COLORS))]
        for part in ("train", "val")
    }
    (tmp_path / "split_zhou_d.json").write_text(json.dumps(coop))
    options = DataConfig(root=root, split_file=str(tmp_path / "split_zhou_d.json"))
    for memory_gb in (1.0, 0.0):
        data = make(replace(options, memory_gb=memory_gb))
        assert set(keys_of(data.train_dataloader())) == {entry[0] for entry in coop["train"]}
        assert sorted(keys_of(data.val_dataloader())) == sorted(e[0] for e in coop["val"])


def test_test_images_cannot_be_trained_on(tmp_path):
    root = write_images(tmp_path / "d", per_class=12)
    options = DataConfig(root=root)
    key = next(iter(options.load().source("test"))).key
    (tmp_path / "s.json").write_text(json.dumps({"train": [[key, 0, ""]]}))
    with pytest.raises(VlkrError, match=f"are not in the dataset's train or val.* such as '{key}'"):
        make(replace(options, split_file=str(tmp_path / "s.json")))


# Bad images


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_bad_images_are_skipped_and_counted(tmp_path, memory_gb):
    root = write_images(tmp_path / "d", per_class=6, splits=("train", "test"))
    (root / "train" / "red" / "3.png").write_bytes(b"no image")
    options = DataConfig(
        root=root, fraction=1.0, batch_size=9, min_steps_per_epoch=1, memory_gb=memory_gb
    )
    with pytest.raises(VlkrError, match=r"sample 'red/3\.png' is not an image"):
        list(make(options).train_dataloader())
    with pytest.warns(UserWarning, match=r"1 bad sample was skipped; the first: sample 'red/3\.p"):
        keys = keys_of(make(replace(options, max_bad=1)).train_dataloader())
    assert len(keys) == 18
    assert "red/3.png" not in keys
    assert len(set(keys)) == 17


# Normalisation and processes


def test_images_are_normalised_on_the_models_device(tmp_path):
    seen = {}

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            seen["train"] = batch.images
            return self.weight * 0

        def validation_step(self, batch, batch_idx):
            seen["val"], seen["val keys"] = batch.images, batch.keys

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters())

    options = DataConfig(root=write_images(tmp_path / "d"), shots=2, batch_size=6)
    eval_transform = image_transform(8, is_train=False)
    data = FewShotDataModule(options.load(), options, 1, AUGMENT, eval_transform)
    (plain, *_) = data.train_dataloader()
    assert plain.images.dtype == torch.uint8
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=1,
            limit_train_batches=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), datamodule=data)
    mean, std = (torch.tensor(v)[:, None, None] for v in (AUGMENT.mean, AUGMENT.std))
    torch.testing.assert_close(seen["train"], (plain.images / 255 - mean) / std)
    by_key = {s.key: s for s in data.dataset.source("train")}
    expected = [eval_transform(decode_image(by_key[key])) for key in seen["val keys"]]
    assert torch.equal(seen["val"], torch.stack(expected))


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_images(tmp_path, processes, memory_gb):
    options = DataConfig(
        root=write_images(tmp_path / "d", per_class=20),
        shots=5,
        batch_size=4,
        min_steps_per_epoch=1,
        memory_gb=memory_gb,
    )
    train, val, steps = Counter(), Counter(), set()
    for rank in range(processes):
        data = make(options)
        data.trainer = mock.Mock(global_rank=rank, world_size=processes)
        loader = data.train_dataloader()
        steps.add(len(loader))
        train.update(keys_of(loader))
        with mock.patch.multiple(
            "vlkr.datasets.loading", rank=lambda rank=rank: rank, world_size=lambda: processes
        ):
            val.update(keys_of(data.val_dataloader()))
    assert len(steps) == 1
    assert set(train) == {s.key for s in data.split.train}
    assert val == Counter(s.key for s in data.split.val)
    if memory_gb == 0:
        assert set(train.values()) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bad": -1}, "data.max_bad is -1: it should be greater than or equal to 0"),
        ({"memory_gb": -1.0}, "data.memory_gb is -1.0: it should be greater"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0: it should be greater"),
        ({"split_file": "nowhere.jsonl"}, r"cannot read nowhere\.jsonl"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(VlkrError, match=message):
        DataConfig(root=write_images(tmp_path / "d"), **options).load()
