from collections import Counter
from unittest import mock

import pytest
import torch
from helpers import color_image
from streams import tiny_samples
from torchvision.transforms import v2

from vlkr.datasets import Sample
from vlkr.datasets.epochs import EpochSampler, FewShotImages, MemoryPlan
from vlkr.datasets.loading import BadSamples, TrainTransform, collate
from vlkr.errors import VlkrError

AUGMENT = TrainTransform((16, 16), [0.5] * 3, [0.5] * 3, "bilinear", (0.3, 1.0), True)
pixels = v2.functional.pil_to_tensor


# Few images in memory


def test_augmentation_follows_from_the_item_alone():
    samples = [Sample(f"k{i}", color_image("red", i), i) for i in range(2)]
    images = FewShotImages(samples, AUGMENT)
    state = torch.get_rng_state()
    first, label, key, domain = images[1, 7]
    assert (label, key, domain) == (1, "k1", None)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(images[1, 7].image, first)
    assert not torch.equal(images[1, 8].image, first)
    flipped = [images[0, seed].image for seed in range(8)]
    assert not any(torch.equal(image.flip(-1), image) for image in flipped)


def test_images_are_decoded_once_and_kept_as_bytes():
    samples = tiny_samples(3)
    images = FewShotImages([*samples, samples[0]], pixels)
    assert all(image.dtype == torch.uint8 for image in images.images)
    assert images.nbytes == 3 * 4 * 4 * 3  # a repeated one is kept once
    with mock.patch("vlkr.datasets.epochs.decode_image", side_effect=AssertionError):
        assert [int(images[i, 0].image[0, 0, 0]) for i in range(4)] == [0, 1, 2, 0]
    assert images.keys == ["k0", "k1", "k2", "k0"]
    assert not any(sample.image for sample in images.samples)


def test_images_beyond_the_bound_stay_encoded():
    samples = tiny_samples(5)
    decoded = FewShotImages(samples, AUGMENT)
    encoded = FewShotImages(samples, AUGMENT, max_bytes=4 * 48)
    assert encoded.images is None
    assert encoded.nbytes == sum(len(sample.image) for sample in samples)
    for item in ((3, 5), (0, 1)):
        assert torch.equal(encoded[item].image, decoded[item].image)


def test_bad_images_in_memory_are_left_out_and_counted():
    samples = [tiny_samples(1)[0], Sample("bad", b"no image", 1), *tiny_samples(3)[1:]]
    with pytest.raises(VlkrError, match="sample 'bad'"):
        FewShotImages(samples, pixels)
    bad = BadSamples(1)
    images = FewShotImages(samples, pixels, bad=bad)
    assert images.keys == ["k0", "k1", "k2"]
    with pytest.warns(UserWarning, match="^1 bad sample was skipped; the first: sample 'bad'"):
        bad.warn()
    bad.warn()  # and is told once


def test_bad_images_that_stay_encoded_are_replaced_within_their_batch():
    samples = [*tiny_samples(2), Sample("bad", b"no image", 1), *tiny_samples(4)[2:]]
    images = FewShotImages(samples, pixels, max_bytes=1, bad=BadSamples(1))
    batch = collate([images[i, 0] for i in range(5)])
    assert batch.keys == ["k0", "k1", "k2", "k2", "k3"]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2, 2, 3]


# Order


def items_of(plan, epoch=0, rank=0):
    sampler = EpochSampler(plan, rank)
    sampler.set_epoch(epoch)
    return [plan.items(*batch) for batch in sampler]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "min_steps", "steps"),
    [(10, 4, 1, 3), (12, 4, 1, 3), (10, 4, 8, 8), (1, 4, 2, 2), (100, 32, 3, 4)],
)
def test_an_epoch_is_whole_batches_of_whole_permutations(num_samples, batch_size, min_steps, steps):
    batches = items_of(MemoryPlan(num_samples, batch_size, min_steps, 1, seed=3))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    order = [index for batch in batches for index, _ in batch]
    counts = Counter(order)
    assert set(counts) == set(range(num_samples))
    assert max(counts.values()) - min(counts.values()) <= 1
    whole = len(order) // num_samples
    for start in range(0, whole * num_samples, num_samples):
        assert sorted(order[start : start + num_samples]) == list(range(num_samples))


def test_order_and_augmentation_follow_from_seed_and_epoch():
    def epoch(seed, number):
        return [item for batch in items_of(MemoryPlan(10, 4, 5, 1, seed), number) for item in batch]

    assert epoch(1, 2) == epoch(1, 2)
    epochs = [epoch(seed, number) for seed in (1, 2) for number in (0, 1, 2)]
    orders = {tuple(index for index, _ in items) for items in epochs}
    seeds = {seed for items in epochs for _, seed in items}
    assert len(orders) == 6
    assert len(seeds) == 6 * 20


def test_processes_share_an_epoch_without_overlap():
    whole = items_of(MemoryPlan(10, 8, 2, 1, seed=1))
    parts = [items_of(MemoryPlan(10, 4, 2, 2, seed=1), rank=rank) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert (first, second) == (batch[::2], batch[1::2])


def test_an_epoch_can_be_begun_later():
    sampler = EpochSampler(MemoryPlan(10, 4, 5, 1, 1))
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.start = 3
    sampler.set_epoch(2)
    assert list(sampler) == whole[3:] == [(2, 3), (2, 4)]
    sampler.set_epoch(3)
    assert len(list(sampler)) == 5
