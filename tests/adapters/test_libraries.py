"""Whole models of several libraries against plain ones with the adapted weights written in."""

import open_clip
import pytest
import timm
import torch
from helpers import assert_near
from torch import nn
from torchvision.models import VisionTransformer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from vlkr.adapters import adapter_parameters, add_adapters, merge_and_unload

SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
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


def transformers_clip():
    sizes = {**SIZES, "num_attention_heads": 2}
    # the last of the tokens below is the end: the first one would see no other
    text = {"vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 10, **sizes}
    vision = {"image_size": 28, "patch_size": 14, **sizes}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def transformers_siglip():
    sizes = {**SIZES, "num_attention_heads": 2}
    text = {"vocab_size": 99, "max_position_embeddings": 16, **sizes}
    vision = {"image_size": 28, "patch_size": 14, **sizes}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def llama():
    config = LlamaConfig(vocab_size=99, num_attention_heads=2, num_key_value_heads=1, **SIZES)
    return LlamaForCausalLM(config)


def coca():
    config = open_clip.get_model_config("coca_ViT-B-32")
    config.pop("custom_text")
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"layers": 2, "width": 32, "head_width": 16, "image_size": 28}
    config["vision_cfg"] |= {"patch_size": 14, "attn_pooler_heads": 2}
    config["text_cfg"] |= {"layers": 2, "width": 32, "heads": 2}
    config["multimodal_cfg"] |= {"layers": 2, "width": 32, "heads": 2}
    model = open_clip.CoCa(**config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def swiglu():
    return timm.create_model("eva02_tiny_patch14_224", num_classes=3, **SMALL)


def features(model, images):
    """Everything that a model of images, texts or both gives, flat."""
    tokens = torch.arange(3, 11).expand(2, -1)
    if isinstance(model, LlamaForCausalLM):
        return model(input_ids=tokens).logits.flatten()
    if isinstance(model, open_clip.CoCa):
        output = model(images, open_clip.tokenize(["a cat", "a dog"], context_length=76))
        return torch.cat([output[k].flatten() for k in ("image_features", "logits")])
    if isinstance(model, CLIPModel | SiglipModel):
        output = model(input_ids=tokens, pixel_values=images)
        return torch.cat([output.image_embeds.flatten(), output.text_embeds.flatten()])
    return image_output(model, images).flatten()


MODELS = {
    "timm ViT": (timm_vit("vit_tiny_patch16_224"), SHORT_NAMES),
    "timm BEiT": (timm_vit("beit_base_patch16_224"), SHORT_NAMES),
    "timm EVA": (timm_vit("eva_giant_patch14_224"), SHORT_NAMES),
    "torchvision ViT": (torchvision_vit, ("*.self_attention.[qkv]", "*.out_proj", "*.mlp.*")),
    "transformers ViT": (transformers_vit, SHORT_NAMES),
    "transformers CLIP": (transformers_clip, SHORT_NAMES),
    "transformers SigLIP": (transformers_siglip, SHORT_NAMES),
    "transformers Llama": (llama, SHORT_NAMES),
    "open_clip CoCa": (coca, SHORT_NAMES),
    "timm SigLIP": (timm_vit("vit_base_patch16_siglip_224"), SHORT_NAMES),
    "timm EVA-02 with SwiGLU": (swiglu, SHORT_NAMES),
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
    y, expected = features(model, images), features(plain(model, base), images)
    assert_near(y, expected, condition=8)
    assert (y - features(base, images)).abs().max() > 1e-3
    (y * torch.randn_like(y)).sum().backward()  # features may have unit length
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model))
    with torch.no_grad():
        assert_near(features(model, images), expected, condition=8)


@pytest.mark.parametrize("targets", [SHORT_NAMES, ("qkv", "out", "fc1", "fc2")])
@pytest.mark.parametrize("method", ["kradapter", "lora", "dora", "bitfit"])
def test_tiny_open_clip_equals_a_plain_one_with_the_adapted_weights(
    targets, method, tiny_clip, adapt, plain
):
    model, base, _ = adapt(tiny_clip, method, targets=targets)
    images, tokens = torch.randn(2, 3, 16, 16), torch.randint(1, 64, (3, 8))
    outputs = [one(images, tokens)[:2] for one in (model, plain(model, base), base)]
    for output, expected, before in zip(*outputs, strict=True):
        assert_near(output, expected, condition=8)
        assert (output - before).abs().max() > 1e-3
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
    merge_and_unload(model)
    other = open_clip.create_model("ViT-B-32").eval()
    assert model.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(model.state_dict())
    for output, expected, base in zip(adapted, features(other), before, strict=True):
        assert_near(output, expected, terms=768)
        assert (output - base).abs().max() > 1e-2
