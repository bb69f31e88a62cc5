import open_clip
import pytest
from timm.data import ImageNetInfo

from vlkr.errors import VlkrError
from vlkr.models.class_names import shipped


def test_class_names_and_synsets_are_in_one_order():
    names = shipped("open_clip:IMAGENET_CLASSNAMES")
    synsets = shipped("timm:imagenet_synsets")
    assert names == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert synsets == tuple(ImageNetInfo().label_names())
    assert len(names) == len(synsets) == 1000
    assert (synsets[207], names[207]) == ("n02099601", "Golden Retriever")


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_indices_of_the_subsets_are_those_of_their_synsets(name):
    synsets = shipped("timm:imagenet_synsets")
    indices = [int(index) for index in shipped(f"timm:{name}_indices")]
    assert len(indices) == 200
    assert [synsets[index] for index in indices] == list(shipped(f"timm:{name}_synsets"))


@pytest.mark.parametrize(
    ("name", "number"), [("OPENAI_IMAGENET_TEMPLATES", 80), ("SIMPLE_IMAGENET_TEMPLATES", 7)]
)
def test_templates(name, number):
    templates = shipped(f"open_clip:{name}")
    assert [t.replace("{c}", "cat") for t in templates] == [
        t("cat") for t in getattr(open_clip, name)
    ]
    assert len(templates) == number


@pytest.mark.parametrize(
    "reference",
    ["", "timm:", "timm:nothing", "timm:../../x", "open_clip:create_model", "os:environ"],
)
def test_lists_that_do_not_exist(reference):
    with pytest.raises(VlkrError, match=f"no list '{reference}', expected open_clip:IMAGENET_CLA"):
        shipped(reference)
