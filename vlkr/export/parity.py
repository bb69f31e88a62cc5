"""The check that every export ends with: does it compute what the adapted model computes?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from vlkr.datasets import Dataset, Sample
from vlkr.datasets.images import decode_image
from vlkr.datasets.samples import BadSample, good_samples
from vlkr.errors import VlkrError
from vlkr.export.formats import Predictor, Subject
from vlkr.models.clip import encode_image, encode_text

MAX_IMAGES = MAX_TEXTS = 64
MIN_COSINE = {torch.float32: 0.99999, torch.float16: 0.999, torch.bfloat16: 0.999}
TIE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Parity:
    """Agreement of an export, loaded again, with the adapted model.

    Attributes:
        images: compared, of the run's test split.
        min_image_cosine: least cosine of image features.
        min_text_cosine: least cosine of text features; None from a format without a text encoder.
        same_predictions: fraction of images with the same class. A class counts as the same if the
            adapted model gives it a probability as high as its first choice's, to within ``tie``.
        bound: what the cosines must reach.
        tie: a difference of probabilities.
    """

    images: int
    min_image_cosine: float
    min_text_cosine: float | None
    same_predictions: float
    bound: float
    tie: float

    def to_json(self) -> dict[str, Any]:
        """As a dict."""
        return asdict(self)

    def summary(self) -> str:
        """In a sentence."""
        text = self.min_text_cosine
        texts = "" if text is None else f"of text features {text:.6f}, "
        return (
            f"Compared on {self.images} test images: least cosine of image features "
            f"{self.min_image_cosine:.6f}, {texts}same predictions {self.same_predictions:.0%} "
            f"(needed: {self.bound} and 100%)."
        )


@torch.inference_mode()
def check_parity(
    subject: Subject, predictor: Predictor, dataset: Dataset, dtype: torch.dtype
) -> Parity:
    """Compares features and predictions, each side with its own preprocessing and tokenizer.

    Args:
        subject: the adapted model.
        predictor: the export, loaded from disk.
        dataset: of the run.
        dtype: of the exported weights.

    Raises:
        VlkrError: if a cosine is below the bound of the dtype, or a prediction differs.
    """
    adapted, classifier = subject.adapted, subject.classifier
    images = spread_images(dataset, MAX_IMAGES)
    pixels = torch.stack([adapted.preprocess(image) for image in images])
    own_pixels = torch.stack([predictor.preprocess(image) for image in images])
    features = encode_image(adapted.model, pixels)
    own_features = predictor.image_features(own_pixels)
    probabilities = classifier.logits(features).softmax(1)
    chosen = predictor.logits(own_pixels).argmax(1, keepdim=True)
    lost = probabilities.amax(1) - probabilities.gather(1, chosen).squeeze(1)
    parity = Parity(
        images=len(images),
        min_image_cosine=F.cosine_similarity(features, own_features).min().item(),
        min_text_cosine=_min_text_cosine(subject, predictor) if adapted.has_text else None,
        same_predictions=(lost <= TIE[dtype]).double().mean().item(),
        bound=MIN_COSINE[dtype],
        tie=TIE[dtype],
    )
    cosines = [parity.min_image_cosine, parity.min_text_cosine]
    if parity.same_predictions < 1 or not all(c is None or c >= parity.bound for c in cosines):
        raise VlkrError(f"the export differs from the adapted model. {parity.summary()}")
    return parity


def _min_text_cosine(subject: Subject, predictor: Predictor) -> float | None:
    adapted, head = subject.adapted, subject.classifier
    prompts = [t.replace("{c}", name) for name in head.class_names for t in head.templates]
    texts = prompts[:: -(-len(prompts) // MAX_TEXTS)]
    tokens = adapted.tokenizer(texts)
    found = predictor.text_features(texts, tokens)
    if found is None:
        return None
    return F.cosine_similarity(encode_text(adapted.model, tokens), found).min().item()


def spread_images(dataset: Dataset, count: int) -> list[Image.Image]:
    """Up to ``count`` test images that can be read, in turn from parts all over the split.

    Raises:
        VlkrError: if there is none.
    """
    shards = dataset.source("test").shards()
    step = -(-len(shards) // count)
    order = [shard for start in range(step) for shard in shards[start::step]]
    parts = [good_samples(shard) for shard in order]
    images = list(islice(_decodable(_in_turn(parts)), count))
    if not images:
        raise VlkrError(f"dataset {dataset.name!r} has no test image to compare the export on")
    return images


def _in_turn(iterators: list[Iterator[Sample]]) -> Iterator[Sample]:
    while iterators:
        left = []
        for iterator in iterators:
            sample = next(iterator, None)
            if sample is not None:
                yield sample
                left.append(iterator)
        iterators = left


def _decodable(samples: Iterator[Sample]) -> Iterator[Image.Image]:
    for sample in samples:
        image = decode_image(sample)
        if not isinstance(image, BadSample):
            yield image
