"""What an adapted model computes, with its adapters injected: the reference of every export."""

from typing import NamedTuple

import torch
from torch import Tensor

from vlkr.adapters import merge_and_unload, set_adapter_scale
from vlkr.models.zero_shot import class_embeddings
from vlkr.runs import RunFolder


class Outputs(NamedTuple):
    features: Tensor
    texts: Tensor | None
    logits: Tensor


def merged(run):
    """The bundle of a run, its adapters merged."""
    bundle = RunFolder.open(run).load_model()
    merge_and_unload(bundle.model)
    return bundle


def prompts_of(run):
    """Class names, and prompts class by class."""
    dataset = RunFolder.open(run).dataset()
    prompts = [t.replace("{c}", c) for c in dataset.class_names for t in dataset.templates]
    return list(dataset.class_names), prompts


@torch.no_grad()
def outputs(run, images, scale=1):
    bundle = RunFolder.open(run).load_model()
    set_adapter_scale(bundle.model, scale)
    names, prompts = prompts_of(run)
    pixels = torch.stack([bundle.preprocess(image) for image in images])
    features = bundle.model.encode_image(pixels, normalize=True)
    if bundle.has_text:
        tokens = bundle.tokenizer(prompts)
        texts = bundle.model.encode_text(tokens, normalize=True)
        classes = class_embeddings(bundle.model, tokens.unflatten(0, (len(names), -1)))
    else:
        texts, classes = None, bundle.head()
    return Outputs(features, texts, bundle.model.logit_scale.exp() * features @ classes.T)
