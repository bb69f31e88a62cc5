import open_clip
import pytest
import torch

from vlkr.models.clip import load_clip
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts

NAMES = ["red", "green", "dark blue", "{c}"]
TEMPLATES = ["a photo of a {c}.", "{c}", "the {c}, once more {c}"]


@pytest.fixture(scope="module")
def bundle(small):
    return load_clip(small)


@pytest.mark.parametrize("num_templates", [1, 3])
@torch.no_grad()
def test_equals_open_clips_zero_shot_classifier(bundle, small, num_templates):
    model = open_clip.create_model_and_transforms(small)[0].eval()
    tokenizer = open_clip.get_tokenizer(small)
    templates = [
        lambda name, template=template: template.replace("{c}", name)
        for template in TEMPLATES[:num_templates]
    ]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, templates)
    prompts = tokenize_prompts(bundle.tokenizer, NAMES, TEMPLATES[:num_templates])
    assert prompts.shape == (4, num_templates, 16)
    found = class_embeddings(bundle.model, prompts)
    assert found.shape == (4, 32)
    torch.testing.assert_close(found, expected.T)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


@torch.no_grad()
def test_chunks_change_nothing(bundle):
    prompts = tokenize_prompts(bundle.tokenizer, NAMES, TEMPLATES)
    whole = class_embeddings(bundle.model, prompts)
    for chunk in (1, 3, 4, 100):
        torch.testing.assert_close(class_embeddings(bundle.model, prompts, chunk), whole)
