"""Formats as the libraries that they are made for read them."""

import open_clip
import pytest
import timm
import tokenizers
import torch
import transformers
from export.outputs import merged
from helpers import tree
from peft import PeftModel

from vlkr.adapters import load_adapter
from vlkr.errors import VlkrError
from vlkr.export import parity
from vlkr.export import timm as timm_export
from vlkr.export.export import export, load_export, load_input
from vlkr.export.formats import get_format
from vlkr.models.clip import clip_shapes, load_clip


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """Every test makes comparisons of its own beside those of an export."""
    monkeypatch.setattr(parity, "MAX_IMAGES", 4)


@pytest.mark.parametrize(
    "pool", [("", "linear", False), ("avg", "linear", True), ("token", None, False)]
)
def test_timm_tower_of_a_clip(pool, write_model, make_run, digit_images, tmp_path):
    names = ("timm_pool", "timm_proj", "timm_proj_bias")
    vision = {
        "timm_model_name": "test_vit",
        "image_size": 160,
        **dict(zip(names, pool, strict=True)),
    }
    run = make_run(tmp_path / "run", write_model(tmp_path / "clip", vision_cfg=vision))
    export(run, tmp_path / "out", format="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert list(config["mean"]) == [0.5, 0.4, 0.3]
    preprocess = timm.data.create_transform(**config)
    plain = merged(run)
    pixels = torch.stack([preprocess(image) for image in digit_images[:8]])
    wanted = torch.stack([plain.preprocess(image) for image in digit_images[:8]])
    assert torch.equal(pixels, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), plain.model.encode_image(pixels))
    assert model.num_classes == 24


ARCHITECTURES = {
    "quick_gelu": (
        {
            "quick_gelu": True,
            "vision_cfg": {"norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 3.0},
            "custom_text": True,
            "nonscalar_logit_scale": True,
        },
        ("quick_gelu", "quick_gelu"),
    ),
    "tanh": (
        {"text_cfg": {"act_kwargs": {"approximate": "tanh"}}, "resize_mode": "shortest"},
        ("gelu", "gelu_pytorch_tanh"),
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_of_other_architectures(name, write_model, make_run, digit_images, tmp_path):
    changes, activations = ARCHITECTURES[name]
    clip = write_model(tmp_path / "clip", **changes)
    run = make_run(tmp_path / "run", clip, std=0.1)
    export(run, tmp_path / "out", format="transformers")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.vision_config.hidden_act, config.text_config.hidden_act) == activations
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    images = [image.resize((20, 12)) for image in digit_images[:4]]
    inputs = processor(
        text=["a", "the digit two"], images=images, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**inputs)
        plain = merged(run)
        pixels = torch.stack([plain.preprocess(image) for image in images])
        tokens = plain.tokenizer(["a", "the digit two"])
        features = plain.model.encode_image(pixels, normalize=True)
        texts = plain.model.encode_text(tokens, normalize=True)
        wanted = plain.model.logit_scale.exp() * features @ texts.T
    # The default processor resizes with torchvision, which may round a pixel the other way.
    assert (inputs["pixel_values"] - pixels).abs().max() <= 1.01 / 255 / 0.2
    torch.testing.assert_close(found.text_embeds, texts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits_per_image, wanted, atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    ("name", "vision", "text", "changes", "message"),
    [
        ("transformers", {"layers": [1] * 4, "width": 16}, {}, {}, "tower is a ModifiedResNet"),
        ("transformers", {"attentional_pool": True}, {}, {}, "pools by attention"),
        ("transformers", {"pool_type": "avg"}, {}, {}, "tower pools 'avg', expected 'tok'"),
        ("transformers", {"no_ln_pre": True}, {}, {}, "vision_model.pre_layrnorm.weight"),
        ("transformers", {"ls_init_value": 0.1}, {}, {}, "no place for visual.transformer.resbl"),
        ("transformers", {"qk_norm": True}, {}, {}, "has blocks CustomResidualAttentionBlock"),
        ("transformers", {}, {"pool_type": "last"}, {}, "tower pools 'last', expected 'argmax'"),
        ("transformers", {}, {"no_causal_mask": True}, {}, "text tower is not causal"),
        ("transformers", {}, {"proj_bias": True}, {}, "no place for text_projection.weight"),
        ("transformers", {}, {}, {"init_logit_bias": -10.0}, "no place for logit_bias"),
        (
            *("transformers", {}, {"tokenizer_kwargs": {"clean": "whitespace"}}, {}),
            "CLIP's own tokenizer",
        ),
        ("transformers", {}, {}, {"resize_mode": "longest"}, "no resize mode 'longest'"),
        ("timm", {}, {}, {}, "of 'local-dir:clip' is a VisionTransformer, not a timm model"),
        (
            *("timm", {"timm_model_name": "test_vit", "timm_proj": "mlp", "image_size": 160}),
            *({}, {}, "ends in Mlp, and timm's head holds one linear layer"),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the visual tower has nothing to adapt")
def test_what_a_format_cannot_hold_is_refused(
    name, vision, text, changes, message, write_model, make_run, tmp_path
):
    clip = write_model(tmp_path / "clip", vision_cfg=vision, text_cfg=text, **changes)
    source, _ = load_input(make_run(tmp_path / "run", clip), 1.0)
    with pytest.raises(VlkrError) as raised:
        get_format(name)(source)
    assert message in str(raised.value).replace(clip, "local-dir:clip")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("targets", "options", "alpha"),
    [
        (("q", "k", "v", "out", "fc1", "fc2"), {"rank": 4, "alpha": 2.0}, 1.0),
        (("qkv", "fc1"), {"rank": 3, "use_rslora": True}, 0.5),
    ],
)
def test_lora_for_peft(targets, options, alpha, small, run, make_run, exported, tmp_path):
    base_folder = exported(run, "transformers", alpha=0).folder  # of the same base model
    run = make_run(tmp_path / "run", small, adapter="lora", std=0.2, targets=targets, **options)
    export(run, tmp_path / "out", format="adapter", alpha=alpha)
    pixels, tokens = torch.randn(4, 3, 16, 16), load_clip(small).tokenizer(["red", "a blue one"])
    plain = load_input(run, alpha)[0].merged
    base = transformers.CLIPModel.from_pretrained(base_folder)
    with torch.no_grad():
        before = base(pixel_values=pixels, input_ids=tokens)
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(
            pixel_values=pixels, input_ids=tokens
        )
        wanted = {
            "image_embeds": plain.encode_image(pixels, normalize=True),
            "text_embeds": plain.encode_text(tokens, normalize=True),
        }
        for name, features in wanted.items():
            torch.testing.assert_close(found[name], features, atol=1e-5, rtol=1e-4)
            assert (before[name] - features).abs().max() > 0.01
        bundle = load_clip(small)
        load_adapter(bundle.model, tmp_path / "out")
        features = bundle.model.encode_image(pixels, normalize=True)
        torch.testing.assert_close(features, wanted["image_embeds"], atol=1e-5, rtol=1e-4)


def test_a_model_without_text(vit_run, tmp_path):
    for name in ("open_clip", "transformers"):
        message = f"model 'timm:test_vit' has no text tower, and format {name} holds image-text"
        with pytest.raises(VlkrError, match=message):
            export(vit_run, tmp_path / "out", format=name)
        assert tree(tmp_path) == {}
    result = export(vit_run, tmp_path / "out", format="adapter")
    assert result.parity.min_text_cosine is None
    assert load_export(tmp_path / "out").classifier.class_names[:2] == ("zero", "one")


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "EVA02-B-16", "PE-Core-T-16-384", "MobileCLIP-S1", "ViTamin-S"]
)
def test_timm_builds_the_towers_of_open_clip(name):
    trunk = clip_shapes(name).visual.trunk
    with torch.device("meta"):
        built = timm.create_model(
            trunk.pretrained_cfg["architecture"],
            num_classes=trunk.num_classes,
            **timm_export._arguments(trunk),
        )
    shapes = {key: tensor.shape for key, tensor in trunk.state_dict().items()}
    assert {key: tensor.shape for key, tensor in built.state_dict().items()} == shapes


def write_tokenizer(folder):
    """Writes a tokenizer of words in the files of transformers' tokenizers."""
    words = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "the", "digit", "zero", "one", "two"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def test_a_model_like_siglip(write_model, make_run, digit_images, tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    text = {
        "context_length": 16,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    }
    clip = write_model(
        tmp_path / "clip",
        vision_cfg={"image_size": 32, **vision},
        text_cfg=text,
        custom_text=True,
        embed_dim=64,
        init_logit_bias=-10.0,
    )
    write_tokenizer(tmp_path / "clip")
    run = make_run(tmp_path / "run", clip, std=0.1)
    export(run, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["The digit, TWO!"])
    assert tokens[0].tolist() == [6, 7, 10, 1, *[0] * 12]  # in lower case, without marks, filled up
    plain = merged(run)
    pixels = torch.stack([preprocess(image) for image in digit_images[:4]])
    with torch.no_grad():
        for found, wanted in (
            (model.encode_image(pixels), plain.model.encode_image(pixels)),
            (model.encode_text(tokens), plain.model.encode_text(tokens)),
        ):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert model.logit_bias.item() == -10
