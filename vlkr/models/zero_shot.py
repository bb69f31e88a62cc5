"""Class embeddings: a zero-shot classifier from class names and prompt templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkr.models.clip import encode_text


def tokenize_prompts(
    tokenizer: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Returns the token ids of every template filled with every class name.

    Args:
        tokenizer: tokenizer of the model.
        class_names: one per class.
        templates: prompt templates with the placeholder ``{c}``.

    Returns:
        ``(num_classes, num_templates, context_length)``.
    """
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    tokens: Tensor = tokenizer(prompts).unflatten(0, (len(class_names), len(templates)))
    return tokens


def class_embeddings(model: nn.Module, prompts: Tensor, chunk: int | None = None) -> Tensor:
    """Returns the zero-shot classifier: the normalized mean of each class's normalized features.

    As in CLIP (Radford et al., 2021, section 3.1.4). Classes with equal prompts are encoded once,
    and so are texts that several classes of a chunk share.

    Args:
        model: a CLIP model.
        prompts: ``(num_classes, num_templates, context_length)`` token ids.
        chunk: maximum number of texts encoded at a time, which bounds memory; None for all.

    Returns:
        ``(num_classes, embed_dim)``.
    """
    if chunk is None:
        return F.normalize(_mean_features(model, prompts, chunk), dim=-1)
    # By digest, in an order that does not depend on that of the classes: unique() of all prompts
    # would copy them several times.
    digests = [blake2b(row.numpy()).digest() for row in prompts.cpu().flatten(1)]
    rows = dict(sorted((digest, i) for i, digest in enumerate(digests)))
    parts = torch.tensor(list(rows.values())).split(max(1, chunk // prompts.shape[1]))
    means = torch.cat([_mean_features(model, prompts[part], chunk) for part in parts])
    places = {digest: place for place, digest in enumerate(rows)}
    return F.normalize(means[[places[digest] for digest in digests]], dim=-1)


def _mean_features(model: nn.Module, prompts: Tensor, chunk: int | None) -> Tensor:
    texts, index = prompts.flatten(0, 1).unique(dim=0, return_inverse=True)
    parts = [texts] if chunk is None else texts.split(chunk)
    features = torch.cat([encode_text(model, part) for part in parts])
    mean: Tensor = features[index].unflatten(0, prompts.shape[:2]).mean(1)
    return mean
