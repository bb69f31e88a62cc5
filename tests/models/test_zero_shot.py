import open_clip
import pytest
import torch

from vlkr.datasets.prompts import resolve_templates
from vlkr.models import zero_shot
from vlkr.models.clip import load_clip
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts

NAMES = ["red", "green", "dark blue", "{c}"]
TEMPLATES = ["a photo of a {c}.", "{c}", "the {c}, once more {c}"]


@pytest.fixture(scope="module")
def bundle(small):
    return load_clip(small)


@pytest.fixture
def encoded(monkeypatch):
    """The texts that are encoded, a list a call."""
    calls = []
    plain = zero_shot.encode_text

    def encode_text(model, texts):
        calls.append([tuple(text) for text in texts.tolist()])
        return plain(model, texts)

    monkeypatch.setattr(zero_shot, "encode_text", encode_text)
    return calls


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES, ["imagenet80"]])
@pytest.mark.parametrize("chunk", [None, 7, 256])
@torch.no_grad()
def test_equals_open_clips_zero_shot_classifier(bundle, small, templates, chunk):
    templates = resolve_templates(templates).templates
    model = open_clip.create_model_and_transforms(small)[0].eval()
    tokenizer = open_clip.get_tokenizer(small)
    filled = [lambda name, t=template: t.replace("{c}", name) for template in templates]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, filled)
    prompts = tokenize_prompts(bundle.tokenizer, NAMES, templates)
    assert prompts.shape == (4, len(templates), 16)
    found = class_embeddings(bundle.model, prompts, chunk)
    assert found.shape == (4, 32)
    torch.testing.assert_close(found, expected.T)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


@torch.no_grad()
def test_chunks_change_nothing(bundle):
    prompts = tokenize_prompts(bundle.tokenizer, NAMES, TEMPLATES)
    whole = class_embeddings(bundle.model, prompts)
    for chunk in (1, 2, 3, 7, 12, 100):
        torch.testing.assert_close(class_embeddings(bundle.model, prompts, chunk), whole)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@torch.no_grad()
def test_texts_at_a_time_are_bounded_and_each_class_is_encoded_once(bundle, encoded, chunk):
    names = [f"class {i % 30}" for i in range(40)]  # ten names occur twice
    prompts = tokenize_prompts(bundle.tokenizer, names, [*TEMPLATES, TEMPLATES[0]])
    found = class_embeddings(bundle.model, prompts, chunk)
    assert max(map(len, encoded)) <= chunk
    texts = [text for call in encoded for text in call]
    assert len(texts) == len(set(texts)) == 30 * 3
    torch.testing.assert_close(found[:10], found[30:], rtol=0, atol=0)
    torch.testing.assert_close(found, class_embeddings(bundle.model, prompts))


@torch.no_grad()
def test_a_thousand_classes_and_eighty_templates(bundle, encoded):
    templates = resolve_templates(["imagenet80"]).templates
    # Classes as tokens, for the tokenizer takes longer than this model.
    prompts = tokenize_prompts(bundle.tokenizer, ["dog"], templates).repeat(1000, 1, 1)
    dog = bundle.tokenizer(["dog"])[0, 1]
    names = torch.arange(1000)[:, None, None] + 10_000
    prompts = torch.where(prompts == dog, names, prompts)
    found = class_embeddings(bundle.model, prompts, 256)
    assert found.shape == (1000, 32)
    assert max(map(len, encoded)) <= 256
    assert sum(map(len, encoded)) == 80_000
    chosen = [0, 1, 500, 999]
    torch.testing.assert_close(found[chosen], class_embeddings(bundle.model, prompts[chosen]))
