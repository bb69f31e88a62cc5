"""Computes image features of a split, or reads them from the cache if the tower is frozen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from vlkr.adapters import merged
from vlkr.adapters.hosts import adapter_layers, weights_hash
from vlkr.caching import cached_tensors
from vlkr.datasets import Dataset, Source
from vlkr.datasets.loading import evaluation_loader
from vlkr.datasets.samples import good_samples
from vlkr.errors import VlkrError
from vlkr.models.clip import ClipBundle, encode_image
from vlkr.runtime import check_num_workers, pick_device, world_size

# A matrix product of few rows uses a different kernel, whose sums differ in the last bits; padded
# to a multiple of this many rows, an image's features do not depend on the rest of its batch.
_ROWS = 16


@dataclass(frozen=True)
class Features:
    """Image features of a batch or a split, and the labels of the images.

    Attributes:
        keys: keys of the samples.
        labels: ``(num_images)``, int64.
        domains: domains of the samples; None if the data has none.
        features: ``(num_images, embed_dim)``, normalized, fp32.
    """

    keys: list[str]
    labels: Tensor
    domains: list[str | None]
    features: Tensor

    @classmethod
    def joined(cls, parts: Iterable[Features]) -> Features:
        """Returns all parts, in order, on the CPU."""
        parts = list(parts)
        return cls(
            [key for part in parts for key in part.keys],
            torch.cat([part.labels for part in parts]),
            [domain for part in parts for domain in part.domains],
            torch.cat([part.features.cpu() for part in parts]),
        )

    def split(self, size: int) -> Iterator[Features]:
        """Yields parts of at most ``size`` images."""
        for i in range(0, len(self.keys), size):
            part = slice(i, i + size)
            yield Features(
                self.keys[part], self.labels[part], self.domains[part], self.features[part]
            )


def image_features(
    bundle: ClipBundle,
    dataset: Dataset,
    split: str,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    cache: bool = True,
    max_bad: int = 0,
) -> Features:
    """Returns the features of every image of a split, in the source's order.

    They are cached under the image tower's weights, the preprocessing and the images' bytes,
    unless the tower carries adapters.

    Args:
        bundle: the model, with or without adapters.
        dataset: dataset that has the split.
        split: name of the split.
        batch_size: images per batch.
        num_workers: processes that decode images.
        device: where to compute.
        cache: keep the features on disk.
        max_bad: maximum number of invalid images to skip before failing.

    Raises:
        VlkrError: if the split is missing or empty, or more images cannot be used.
    """
    source = dataset.source(split)
    with evaluation_mode(bundle, device) as model:
        parts = list(
            feature_batches(model, source, batch_size, num_workers, cache=cache, max_bad=max_bad)
        )
    if not parts:
        raise VlkrError(f"dataset {dataset.name!r} has no images in its split {split!r}")
    return Features.joined(parts)


@dataclass
class EvalModel:
    """A model during evaluation: on its device, without gradients, adapters merged."""

    bundle: ClipBundle
    device: torch.device

    @property
    def module(self) -> nn.Module:
        """The PyTorch model."""
        return self.bundle.model

    @cached_property
    def image_tower_hash(self) -> str:
        """Returns a hash of the weights behind image features, including merged adapters."""
        return weights_hash(self.module.get_submodule("visual"))

    @cached_property
    def text_tower_hash(self) -> str:
        """Returns a hash of the weights behind class embeddings, including merged adapters."""
        return weights_hash(self.module, without="visual")


@contextmanager
def evaluation_mode(bundle: ClipBundle, device: str) -> Iterator[EvalModel]:
    """Moves the model to a device and merges its adapters within the block."""
    target = pick_device(device)
    model = bundle.model.to(target).eval()
    adapted = any(True for _ in adapter_layers(model))
    with merged(model) if adapted else nullcontext(), torch.inference_mode():
        yield EvalModel(bundle, target)


def feature_batches(
    model: EvalModel,
    source: Source,
    batch_size: int,
    num_workers: int,
    *,
    cache: bool,
    max_bad: int = 0,
    advance: Callable[[int], object] = lambda images: None,
) -> Iterator[Features]:
    """Yields a split's features batch by batch; of several processes, each has its share.

    Args:
        model: in evaluation mode.
        source: the images.
        batch_size: images per batch.
        num_workers: processes that decode images.
        cache: keep those of a frozen image tower on disk, unless processes share the images.
        max_bad: maximum number of invalid images to skip before failing.
        advance: called with the number of images of each batch that was encoded.
    """
    if batch_size < 1:
        raise VlkrError(f"batch size {batch_size} is too small, expected at least 1")
    check_num_workers(num_workers)
    encoded = _encoded(model, source, batch_size, num_workers, max_bad, advance)
    adapted = any(path.split(".")[0] == "visual" for path, _ in adapter_layers(model.module))
    if not cache or adapted or world_size() > 1:
        yield from encoded
        return

    def make() -> tuple[dict[str, Tensor], dict[str, str]]:
        parts = list(encoded)
        if not parts:
            return {}, {}
        whole = Features.joined(parts)
        texts = {"keys": json.dumps(whole.keys), "domains": json.dumps(whole.domains)}
        return {"labels": whole.labels, "features": whole.features}, texts

    key = {
        "weights": model.image_tower_hash,
        "preprocess": json.dumps(model.bundle.preprocess_cfg, sort_keys=True, default=str),
        "images": fingerprint(source),
        "max_bad": max_bad,
    }
    tensors, texts = cached_tensors("image_features", key, make)
    if tensors:
        keys, domains = json.loads(texts["keys"]), json.loads(texts["domains"])
        yield from Features(keys, tensors["labels"], domains, tensors["features"]).split(batch_size)


def fingerprint(source: Source) -> str:
    """Returns a hash of keys, labels, domains and encoded images, in order."""
    digest = blake2b(digest_size=32)
    for sample in good_samples(source):
        about: list[Any] = [sample.key, sample.label, sample.domain, len(sample.image)]
        digest.update(json.dumps(about).encode())
        digest.update(sample.image)
    return digest.hexdigest()


def _encoded(
    model: EvalModel,
    source: Source,
    batch_size: int,
    num_workers: int,
    max_bad: int,
    advance: Callable[[int], object],
) -> Iterator[Features]:
    rows = min(_ROWS, batch_size)
    transform = model.bundle.preprocess
    loader = evaluation_loader(source, transform, batch_size, num_workers, max_bad=max_bad)
    for batch in loader:
        number, images = len(batch.keys), batch.images
        if missing := -number % rows:
            images = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
        images = loader.normalize(images.to(model.device))
        features = encode_image(model.module, images)[:number]
        advance(number)
        yield Features(batch.keys, batch.labels, batch.domains, features.float())
