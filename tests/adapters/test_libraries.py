"""Whole models of several libraries against plain ones with the adapted weights written in."""

import open_clip
import pytest
import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlkr.adapters import adapter_parameters, add_adapters, merge_adapters

SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
SHORT_NAMES = ("q", "k", "v", "out", "fc1", "fc2")


def timm_vit(name):
    return lambda: timm.create_model(name, pretrained=False, num_classes=3, **SMALL)


def torchvision_vit():
    return VisionTransformer(28, 14, 2, 2, 32, 64, num_classes=3)


def transformers_vit():
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return CLIPVisionModel(config)


MODELS = {
    "timm ViT": (timm_vit("vit_tiny_patch16_224"), SHORT_NAMES),
    "timm BEiT": (timm_vit("beit_base_patch16_224"), SHORT_NAMES),
    "timm EVA": (timm_vit("eva_giant_patch14_224"), SHORT_NAMES),
    "torchvision ViT": (torchvision_vit, ("*.self_attention.[qkv]", "*.out_proj", "*.mlp.*")),
    "transformers ViT": (transformers_vit, SHORT_NAMES),
}


def image_output(model, images):
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("build", "targets"), MODELS.values(), ids=list(MODELS))
def test_every_adapter_acts_in_the_whole_model(build, targets, training, adapt, plain):
    model = build().train(training)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)  # some heads start at zero
    model, base, _ = adapt(model, "kradapter", targets=targets)
    images = torch.randn(2, 3, 28, 28)
    y, expected = image_output(model, images), image_output(plain(model, base), images)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert (y - image_output(base, images)).abs().max() > 1e-3
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model))
    with torch.no_grad():
        torch.testing.assert_close(image_output(model, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [SHORT_NAMES, ("qkv", "out", "fc1", "fc2")])
def test_tiny_open_clip_equals_a_plain_one_with_the_adapted_weights(
    targets, method, tiny_clip, adapt, plain
):
    model, base, _ = adapt(tiny_clip, method, targets=targets)
    images, tokens = torch.randn(2, 3, 16, 16), torch.randint(1, 64, (3, 8))
    outputs = [one(images, tokens)[:2] for one in (model, plain(model, base), base)]
    for found, expected, before in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found - before).abs().max() > 1e-3
    sum((features * torch.randn(16)).sum() for features in outputs[0]).backward()
    assert all(p.grad.isfinite().all() for p in adapter_parameters(model))


@pytest.mark.slow
def test_vit_b_32_with_merged_weights_is_a_plain_open_clip_model():
    model = open_clip.create_model("ViT-B-32").eval()
    images, tokens = torch.randn(2, 3, 224, 224), torch.randint(1, 49407, (2, 77))

    def features(one):
        with torch.no_grad():
            return one.encode_image(images), one.encode_text(tokens)

    before = features(model)
    add_adapters(model, "kradapter")
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.add_(0.02 * torch.randn_like(p))
    adapted = features(model)
    merge_adapters(model)
    other = open_clip.create_model("ViT-B-32").eval()
    assert model.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(model.state_dict())
    for found, expected, base in zip(adapted, features(other), before, strict=True):
        assert (found - expected).abs().max() < 1e-4
        assert (found - base).abs().max() > 1e-2
