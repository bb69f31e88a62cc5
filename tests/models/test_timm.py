import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import REAL
from PIL import Image
from safetensors.torch import save_file

import vlkr
from vlkr.errors import VlkrError
from vlkr.models.loading import load_model
from vlkr.models.timm import load_vit

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """timm's model with random weights, and their path."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False).eval()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return model, path


@pytest.fixture(scope="module")
def bundle(weights):
    return load_model(f"timm:{NAME}", str(weights[1]))


def test_features_are_timms_pooled_ones(weights, bundle):
    model, _ = weights
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(bundle.model.encode_image(images), expected)
        unit = bundle.model.encode_image(images, normalize=True)
    torch.testing.assert_close(unit, F.normalize(expected, dim=-1))


def test_preprocessing_is_the_models_own(weights, bundle):
    config = timm.data.resolve_model_data_config(weights[0])
    image = Image.effect_noise((300, 250), 60).convert("RGB")
    expected = timm.data.create_transform(**config, is_training=False)(image)
    assert torch.equal(bundle.preprocess(image), expected)
    assert bundle.preprocess_cfg["mean"] == config["mean"]
    assert bundle.preprocess_cfg["size"] == (224, 224)


def test_a_folder_of_timms_own_layout(weights, bundle, tmp_path):
    timm.models.save_for_hf(weights[0], tmp_path / "vit", safe_serialization=True)
    other = load_vit(f"timm:local-dir:{tmp_path / 'vit'}")
    assert other.weights_hash == bundle.weights_hash


def test_adapters_go_into_its_blocks(weights):
    bundle = load_vit(f"timm:{NAME}", str(weights[1]))
    found = vlkr.add_adapters(bundle.model, "kradapter")
    assert len(found) == 12 * 6
    assert {target.tower for target in found} == {"visual"}


def test_it_has_no_text(bundle):
    assert not bundle.has_text
    with pytest.raises(VlkrError, match="no classes before it is adapted"):
        bundle.tokenizer(["a photo of a cat."])


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("vit_tiny_patch16_225", None, "unknown timm model.*did you mean .*vit_tiny_patch16_224"),
        (NAME, "openai", "'openai' is not a file; a timm tag goes into the name"),
        ("local-dir:nowhere", None, "no timm model at nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_named(name, pretrained, message):
    with pytest.raises(VlkrError, match=message):
        load_vit(f"timm:{name}", pretrained)


def test_weights_that_do_not_fit(tmp_path):
    save_file({"blocks.0.norm1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(VlkrError, match="cannot load model 'timm:vit_tiny_patch16_224' with"):
        load_vit(f"timm:{NAME}", str(tmp_path / "other.safetensors"))


@pytest.mark.real
def test_pretrained_weights_tell_classes_apart():
    weights = REAL / "deit_tiny_patch16_224" / "model.safetensors"
    if not weights.is_file():
        pytest.skip(f"no real weights at {weights}")
    bundle = load_vit("timm:deit_tiny_patch16_224", str(weights))
    photos = REAL / "pacs" / "photo"
    features = []
    for name in ("dog", "guitar"):
        files = sorted((photos / name).glob("*.jpg"))[:4]
        images = torch.stack([bundle.preprocess(Image.open(f).convert("RGB")) for f in files])
        with torch.no_grad():
            features.append(bundle.model.encode_image(images, normalize=True))
    dog, guitar = features
    assert (dog @ dog.T).mean() > 2 * (dog @ guitar.T).mean()
