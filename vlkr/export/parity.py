from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from vlkr.datasets import Dataset
from vlkr.datasets.pipelines import decode_image
from vlkr.errors import VlkrError
from vlkr.models.clip import ClipBundle, encode_image, logit_scale
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts

MIN_COSINE_FP32 = 0.99999


@dataclass(frozen=True)
class Parity:
    """Agreement of an exported model with the adapted one.

    Attributes:
        images: compared.
        min_image_cosine: least cosine of image features.
        min_text_cosine: least cosine of class embeddings.
        same_predictions: fraction of images with the same arg-max class.
    """

    images: int
    min_image_cosine: float
    min_text_cosine: float
    same_predictions: float

    def to_json(self) -> dict[str, Any]:
        """As a dict."""
        return asdict(self)


@torch.inference_mode()
def check_parity(
    adapted: ClipBundle, exported: ClipBundle, dataset: Dataset, max_images: int = 64
) -> Parity:
    """Compares features and predictions on the dataset's first test images.

    Args:
        adapted: the model with adapters.
        exported: reloaded from disk.
        dataset: of the run.
        max_images: compared at most.

    Raises:
        VlkrError: if a cosine is below 0.99999 or a prediction differs.
    """
    samples = [decode_image(s) for s in islice(dataset.source("test"), max_images)]
    features, embeddings, predictions = [], [], []
    for bundle in (adapted, exported):
        images = torch.stack([bundle.preprocess(sample) for sample in samples])
        prompts = tokenize_prompts(bundle.tokenizer, dataset.class_names, dataset.templates)
        features.append(encode_image(bundle.model, images))
        embeddings.append(class_embeddings(bundle.model, prompts, chunk=64))
        logits = logit_scale(bundle.model) * features[-1] @ embeddings[-1].T
        predictions.append(logits.argmax(1))
    parity = Parity(
        images=len(samples),
        min_image_cosine=F.cosine_similarity(features[0], features[1]).min().item(),
        min_text_cosine=F.cosine_similarity(embeddings[0], embeddings[1]).min().item(),
        same_predictions=(predictions[0] == predictions[1]).double().mean().item(),
    )
    cosine = min(parity.min_image_cosine, parity.min_text_cosine)
    if not cosine >= MIN_COSINE_FP32 or parity.same_predictions < 1:
        raise VlkrError(
            f"the export differs from the adapted model: least cosine {cosine:.6f} (expected at "
            f"least {MIN_COSINE_FP32}), same predictions {parity.same_predictions:.1%}"
        )
    return parity
