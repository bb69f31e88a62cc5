import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vlkr.errors import VlkrError
from vlkr.models.classifier import ClassHead

NAMES = ("cat", "dog", "guitar")


def test_starts_at_the_normalised_mean_of_each_class():
    features, labels = F.normalize(torch.randn(12, 5), dim=-1), torch.arange(12) % 3
    head = ClassHead(NAMES, 5)
    head.start([(features[:7], labels[:7]), (features[7:], labels[7:])])
    expected = torch.stack([F.normalize(features[labels == c].mean(0), dim=0) for c in range(3)])
    torch.testing.assert_close(head(), expected)


def test_classes_by_name_in_the_order_asked_for():
    head = ClassHead(NAMES, 5)
    torch.nn.init.normal_(head.weight)
    torch.testing.assert_close(head(["guitar", "cat"]), F.normalize(head.weight[[2, 0]], dim=-1))
    assert torch.equal(head(NAMES), head())


def test_a_class_that_was_not_learnt():
    with pytest.raises(VlkrError, match=r"class 'horse' was not learned.*cat, dog, guitar$"):
        ClassHead(NAMES, 5)(["cat", "horse"])


def test_saved_and_loaded(tmp_path):
    head = ClassHead(NAMES, 5)
    torch.nn.init.normal_(head.weight)
    head.save(tmp_path / "head.safetensors")
    loaded = ClassHead.load(tmp_path / "head.safetensors")
    assert loaded.class_names == NAMES
    assert torch.equal(loaded.weight, head.weight)


@pytest.mark.parametrize("damage", ["missing", "bytes", "names", "shape"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "head.safetensors"
    if damage == "bytes":
        path.write_bytes(b"x" * 50)
    elif damage == "names":
        save_file({"weight": torch.zeros(3, 5)}, path)
    elif damage == "shape":
        save_file({"weight": torch.zeros(2, 5)}, path, {"class_names": '["a", "b", "c"]'})
    with pytest.raises(VlkrError, match=r"cannot read class embeddings .*head\.safetensors"):
        ClassHead.load(path)
