import io
from collections import Counter

import pytest
import torch
from helpers import color_image, write_images, write_shards
from PIL import Image
from torchvision.transforms import v2

from vlkr.datasets import Sample, load_dataset
from vlkr.datasets.pipelines import (
    EpochSampler,
    FewShotImages,
    collate,
    decode_image,
    evaluation_loader,
    train_transform,
)
from vlkr.errors import VlkrError


def encode(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    data = encode(Image.new("RGB", (5, 4), (0, 0, 0)).convert(mode), "tiff")
    image = decode_image(Sample("k", data, 0))
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "'k' is no image in a format that is known"),
        (b"garbage", "'k' is no image in a format that is known"),
        (color_image("red", 0)[:200], "'k' is a corrupt image: .*truncated"),
    ],
)
def test_corrupt_images_are_told_by_key(data, message):
    with pytest.raises(VlkrError, match=message):
        decode_image(Sample("k", data, 0))


def test_image_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(VlkrError, match=r"'k' is a corrupt image: .*decompression bomb"):
        decode_image(Sample("k", color_image("red", 0), 0))


def test_whole_crop_without_flip_is_resize_and_normalisation():
    image = decode_image(Sample("k", color_image("red", 0), 0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    transform = train_transform((20, 20), mean, std, "bicubic", (1.0, 1.0), flip=False)
    plain = v2.functional.pil_to_tensor(image).float() / 255
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(transform(image), expected)


def test_augmentation_follows_from_the_item_alone():
    samples = [Sample(f"k{i}", color_image("red", i), i) for i in range(2)]
    transform = train_transform((16, 16), [0.5] * 3, [0.5] * 3, "bilinear", (0.3, 1.0), True)
    images = FewShotImages(samples, transform)
    state = torch.get_rng_state()
    first, label, key = images[1, 7]
    assert (label, key) == (1, "k1")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(images[1, 7][0], first)
    assert not torch.equal(images[1, 8][0], first)
    flipped = sum(torch.equal(images[0, s][0].flip(-1), images[0, s][0]) for s in range(8))
    assert flipped == 0


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "min_steps", "steps"),
    [(10, 4, 1, 3), (12, 4, 1, 3), (10, 4, 8, 8), (1, 4, 2, 2), (100, 32, 3, 4)],
)
def test_an_epoch_is_whole_batches_of_whole_permutations(num_samples, batch_size, min_steps, steps):
    sampler = EpochSampler(num_samples, batch_size, min_steps, seed=3)
    order = [index for index, _ in sampler]
    assert len(sampler) == len(order) == steps * batch_size
    counts = Counter(order)
    assert set(counts) == set(range(num_samples))
    assert max(counts.values()) - min(counts.values()) <= 1
    whole = len(order) // num_samples
    for start in range(0, whole * num_samples, num_samples):
        assert sorted(order[start : start + num_samples]) == list(range(num_samples))


def test_order_follows_from_seed_and_epoch():
    def epoch(seed, number):
        sampler = EpochSampler(10, 4, 5, seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(1, 2) == epoch(1, 2)
    different = [epoch(seed, number) for seed in (1, 2) for number in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])
    seeds = [seed for items in different for _, seed in items]
    assert len(set(seeds)) == len(seeds)


def test_processes_share_an_epoch_without_overlap():
    whole = list(EpochSampler(10, 8, 1, seed=1))
    parts = [list(EpochSampler(10, 4, 1, 1, rank=r, world_size=2)) for r in (0, 1)]
    assert [item for pair in zip(*parts, strict=True) for item in pair] == whole


def test_collate():
    batch = collate([(torch.zeros(3, 2, 2), 1, "a"), (torch.ones(3, 2, 2), 0, "b")])
    assert batch.images.shape == (2, 3, 2, 2)
    assert batch.labels.tolist() == [1, 0]
    assert batch.labels.dtype == torch.int64
    assert batch.keys == ["a", "b"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("write", [write_shards, write_images])
def test_evaluation_sees_every_sample_once_whatever_the_workers(tmp_path, write, workers):
    source = load_dataset(write(tmp_path / "d", per_class=7)).source("test")
    loader = evaluation_loader(source, v2.functional.pil_to_tensor, 4, workers)
    seen = {
        key: (image, label)
        for batch in loader
        for key, image, label in zip(batch.keys, batch.images, batch.labels.tolist(), strict=True)
    }
    assert sum(len(batch.keys) for batch in loader) == len(seen)
    assert {key: label for key, (_, label) in seen.items()} == {s.key: s.label for s in source}
    for sample in source:
        expected = v2.functional.pil_to_tensor(Image.open(io.BytesIO(sample.image)))
        assert torch.equal(seen[sample.key][0], expected)
