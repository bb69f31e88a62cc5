"""The check at the end of every export: whether it computes what the adapted model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from PIL import Image

from vlkr.datasets import Dataset, Sample
from vlkr.datasets.images import decode_image
from vlkr.datasets.samples import BadSample, good_samples
from vlkr.errors import VlkrError
from vlkr.export.formats import Exported, ExportInput
from vlkr.models.clip import encode_image, encode_text

MAX_IMAGES = MAX_TEXTS = 64
MIN_COSINE = {torch.float32: 0.99999, torch.float16: 0.999, torch.bfloat16: 0.999}
TIE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Parity:
    """Agreement of an export, loaded again, with the adapted model.

    Attributes:
        images: number of test images compared.
        min_image_cosine: smallest cosine of image features.
        min_text_cosine: smallest cosine of text features; None without a text encoder.
        same_predictions: fraction of images with the same class. A class counts as the same if its
            probability under the adapted model is within ``tie`` of the highest one.
        bound: smallest cosine allowed.
        tie: difference of probabilities.
    """

    images: int
    min_image_cosine: float
    min_text_cosine: float | None
    same_predictions: float
    bound: float
    tie: float

    def summary(self) -> str:
        """Returns all numbers in a sentence."""
        text = self.min_text_cosine
        texts = "" if text is None else f"of text features {text:.6f}, "
        return (
            f"Compared on {self.images} test images: least cosine of image features "
            f"{self.min_image_cosine:.6f}, {texts}same predictions {self.same_predictions:.0%} "
            f"(needed: {self.bound} and 100%)."
        )


@torch.inference_mode()
def check_parity(
    source: ExportInput, exported: Exported, dataset: Dataset, dtype: torch.dtype
) -> Parity:
    """Compares features and predictions, each side with its own preprocessing and tokenizer.

    A cosine below the bound of the exported weights' dtype is an error, as is a prediction that
    differs.
    """
    adapted, classifier = source.adapted, source.classifier
    images = spread_images(dataset, MAX_IMAGES)
    pixels = torch.stack([adapted.preprocess(image) for image in images])
    own_pixels = torch.stack([exported.preprocess(image) for image in images])
    features = encode_image(adapted.model, pixels)
    own_features = exported.image_features(own_pixels)
    probabilities = classifier.logits(features).softmax(1)
    chosen = exported.logits(own_pixels).argmax(1, keepdim=True)
    lost = probabilities.amax(1) - probabilities.gather(1, chosen).squeeze(1)
    parity = Parity(
        images=len(images),
        min_image_cosine=F.cosine_similarity(features, own_features).min().item(),
        min_text_cosine=_min_text_cosine(source, exported) if adapted.has_text else None,
        same_predictions=(lost <= TIE[dtype]).double().mean().item(),
        bound=MIN_COSINE[dtype],
        tie=TIE[dtype],
    )
    cosines = [parity.min_image_cosine, parity.min_text_cosine]
    if parity.same_predictions < 1 or not all(c is None or c >= parity.bound for c in cosines):
        raise VlkrError(f"the export differs from the adapted model. {parity.summary()}")
    return parity


def _min_text_cosine(source: ExportInput, exported: Exported) -> float | None:
    adapted, head = source.adapted, source.classifier
    prompts = [t.replace("{c}", name) for name in head.class_names for t in head.templates]
    texts = prompts[:: -(-len(prompts) // MAX_TEXTS)]
    tokens = adapted.tokenizer(texts)
    features = exported.text_features(texts, tokens)
    if features is None:
        return None
    return F.cosine_similarity(encode_text(adapted.model, tokens), features).min().item()


def spread_images(dataset: Dataset, count: int) -> list[Image.Image]:
    """Returns at most ``count`` readable test images, in turn from shards all over the split."""
    shards = dataset.source("test").shards()
    step = -(-len(shards) // count)
    order = [shard for start in range(step) for shard in shards[start::step]]
    samples = _round_robin([good_samples(shard) for shard in order])
    decoded = (decode_image(sample) for sample in samples)
    images = list(islice((i for i in decoded if not isinstance(i, BadSample)), count))
    if not images:
        raise VlkrError(f"dataset {dataset.name!r} has no test image to compare the export on")
    return images


def _round_robin(iterators: list[Iterator[Sample]]) -> Iterator[Sample]:
    pending = deque(iterators)
    while pending:
        iterator = pending.popleft()
        if (sample := next(iterator, None)) is not None:
            yield sample
            pending.append(iterator)
