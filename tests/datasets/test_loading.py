import io
import warnings
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from helpers import color_image, write_images, write_shards
from open_clip.transform import image_transform
from PIL import Image
from streams import Listed, dealt, tiny_image, tiny_samples
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from vlkr.datasets import BadSample, Sample, load_dataset
from vlkr.datasets.images import decode_image
from vlkr.datasets.loading import (
    BadSamples,
    Item,
    PixelTransform,
    SampleStream,
    TrainTransform,
    collate,
    evaluation_loader,
    to_tensor,
    without_normalization,
)
from vlkr.errors import VlkrError

AUGMENT = TrainTransform((16, 16), [0.5] * 3, [0.5] * 3, "bilinear", (0.3, 1.0), True)
pixels = v2.functional.pil_to_tensor


# Transforms


def test_whole_crop_without_flip_is_resize_and_normalisation():
    image = decode_image(Sample("k", color_image("red", 0), 0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    transform = TrainTransform((20, 20), mean, std, "bicubic", (1.0, 1.0), flip=False)
    plain = pixels(image).float() / 255
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    cropped = transform(to_tensor(image))
    assert cropped.dtype == torch.uint8
    torch.testing.assert_close(transform.normalize(cropped[None])[0], expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_crops_are_those_of_pillow(interpolation):
    """Fixed-point arithmetic: one level of 256 apart at most."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    image = Image.fromarray(noise)
    transform = TrainTransform((24, 24), [0] * 3, [1] * 3, interpolation, (0.3, 1.0), True)
    mode = v2.InterpolationMode("bicubic" if interpolation == "random" else interpolation)
    reference = v2.Compose(
        [v2.RandomResizedCrop(24, scale=(0.3, 1.0), interpolation=mode), v2.RandomHorizontalFlip()]
    )
    for seed in range(10):
        torch.manual_seed(seed)
        ours = transform(to_tensor(image))
        torch.manual_seed(seed)
        theirs = pixels(reference(image))
        assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["open_clip", "timm"])
def test_split_transform_is_the_models_own_to_the_bit(name):
    transform = {
        "open_clip": image_transform(48, is_train=False),
        "timm": timm.data.create_transform((3, 48, 48), mean=(0.1, 0.2, 0.3), std=(0.3, 0.4, 0.6)),
    }[name]
    split = without_normalization(transform)
    assert isinstance(split, PixelTransform)
    noise = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), np.uint8)
    images = [Image.fromarray(image) for image in noise]
    whole = torch.stack([transform(image) for image in images])
    batch = collate([Item(split(image), 0, "k") for image in images])
    assert batch.images.dtype == torch.uint8
    normalized = split.normalize(batch.images)
    assert torch.equal(normalized, whole)
    assert normalized.is_contiguous()
    assert split.normalize(normalized) is normalized  # what is float has been normalised


def test_other_transforms_are_left_as_they_are():
    assert without_normalization(pixels) is pixels
    other = v2.Compose([v2.ToImage()])
    assert without_normalization(other) is other


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_the_models_own_pixels(tmp_path, workers):
    source = load_dataset(write_images(tmp_path / "d", per_class=7)).source("test")
    transform = image_transform(16, is_train=False)
    loader = evaluation_loader(source, transform, 4, workers)
    by_key = {sample.key: sample for sample in source}
    for batch in loader:
        assert batch.images.dtype == torch.uint8
        expected = [transform(decode_image(by_key[key])) for key in batch.keys]
        assert torch.equal(loader.normalize(batch.images), torch.stack(expected))


# Batches


def test_collate():
    batch = collate([Item(torch.zeros(3, 2, 2), 1, "a"), Item(torch.ones(3, 2, 2), 0, "b", "art")])
    assert batch.images.shape == (2, 3, 2, 2)
    assert batch.labels.tolist() == [1, 0]
    assert batch.labels.dtype == torch.int64
    assert batch.keys == ["a", "b"]
    assert batch.domains == [None, "art"]


@pytest.mark.parametrize("is_channels_last", [False, True])
def test_images_are_stacked_as_they_are_laid_out(is_channels_last):
    images = [torch.randint(256, (5, 4, 3), dtype=torch.uint8) for _ in range(3)]
    images = [image.permute(2, 0, 1) for image in images]
    if not is_channels_last:
        images = [image.contiguous() for image in images]
    batch = collate([Item(image, 0, "k") for image in images])
    assert torch.equal(batch.images, torch.stack(images))
    assert batch.images.is_contiguous() != is_channels_last


def test_a_batch_of_bad_samples_is_an_error():
    with pytest.raises(VlkrError, match="each of the 3 samples of a batch is bad"):
        collate([None, None, None])


# Evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("write", [write_shards, write_images])
def test_evaluation_sees_every_sample_once_whatever_the_workers(tmp_path, write, workers):
    source = load_dataset(write(tmp_path / "d", per_class=7)).source("test")
    loader = evaluation_loader(source, pixels, 4, workers)
    batches = list(loader)
    seen = {
        key: (image, label)
        for batch in batches
        for key, image, label in zip(batch.keys, batch.images, batch.labels.tolist(), strict=True)
    }
    assert sum(len(batch.keys) for batch in batches) == len(seen)
    assert {key: label for key, (_, label) in seen.items()} == {s.key: s.label for s in source}
    for sample in source:
        expected = pixels(Image.open(io.BytesIO(sample.image)))
        assert torch.equal(seen[sample.key][0], expected)


def test_one_process_reads_in_the_sources_order():
    source = dealt(tiny_samples(20), 7)
    keys = [key for batch in evaluation_loader(source, pixels, 3, 0) for key in batch.keys]
    assert keys == [f"k{i}" for i in range(20)]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_sample_is_in_one_share(processes, workers):
    """Shares of all processes and workers, each told who it is as a data loader would."""
    for count in (*range(1, 15), 49, 50):
        source = dealt(tiny_samples(count), 7)
        keys = [
            key
            for rank in range(processes)
            for worker in range(workers)
            for key in share_keys(source, rank, processes, worker, workers)
        ]
        assert sorted(keys) == sorted(f"k{i}" for i in range(count))


def share_keys(source, rank, processes, worker, workers):
    info = mock.Mock(id=worker, num_workers=workers)
    with (
        mock.patch("vlkr.datasets.loading.get_worker_info", return_value=info),
        mock.patch.multiple(
            "vlkr.datasets.loading", rank=lambda: rank, world_size=lambda: processes
        ),
        mock.patch("vlkr.datasets.loading.decode_image", return_value=None),
    ):
        stream = SampleStream(source, lambda image: torch.zeros(3, 1, 1), BadSamples())
        return [item.key for item in stream]


def test_whole_shards_are_read_by_one_worker():
    reads = Counter()

    class Shard:
        def __init__(self, number):
            self.number = number

        def __iter__(self):
            reads[self.number] += 1
            return iter(tiny_samples(1))

    source = mock.Mock(shards=lambda: [Shard(i) for i in range(7)])
    for worker in range(3):
        share_keys(source, 0, 1, worker, 3)
    assert reads == {**dict.fromkeys(range(6), 1), 6: 3}


def bad_source():
    samples = tiny_samples(9)
    samples[3] = Sample("k3", b"no image", 1, shard="1.tar")
    parts = [samples[:3], samples[3:6], samples[6:]]
    parts[2].insert(1, BadSample("has no label", "x", "2.tar"))
    return Listed(parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_stops_and_is_named(workers):
    with pytest.raises(VlkrError) as caught:
        list(evaluation_loader(bad_source(), pixels, 2, workers))
    reason, _, hint = str(caught.value).partition("; ")
    assert reason in (
        "1.tar, sample 'k3' is not an image in a known format",
        "2.tar, sample 'x' has no label",
    )
    assert hint == "max_bad lets such samples be skipped"


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_over_all_workers(workers):
    loader = evaluation_loader(bad_source(), pixels, 2, workers, max_bad=2)
    with pytest.warns(UserWarning, match=r"^2 bad samples were skipped; the first: [12]\.tar, s"):
        keys = [key for batch in loader for key in batch.keys]
    assert sorted(keys) == [f"k{i}" for i in (0, 1, 2, 4, 5, 6, 7, 8)]
    with pytest.raises(VlkrError, match=r"^more than 1 bad samples; the last: [12]\.tar, sample"):
        list(evaluation_loader(bad_source(), pixels, 2, workers, max_bad=1))


def test_good_samples_bring_no_warning():
    loader = evaluation_loader(dealt(tiny_samples(4), 2), pixels, 2, 0, max_bad=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(loader, DataLoader)
        assert len(list(loader)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_shard_ends_in_an_error_and_no_short_epoch(workers):
    source = dealt(tiny_samples(20), 7)
    source.parts[5].insert(1, VlkrError("cannot read shard 5.tar: it is cut"))
    with pytest.raises(VlkrError, match=r"^cannot read shard 5\.tar: it is cut$"):
        list(evaluation_loader(source, pixels, 2, workers, max_bad=100))


def test_tiny_images_tell_their_number():
    image = decode_image(Sample("k", tiny_image(300, pad=10), 0))
    assert image.getpixel((0, 0)) == (44, 1, 0)
