import subprocess
import sys

import open_clip
import pytest
from timm.data import ImageNetInfo

from vlkr.datasets.prompts import TemplateSet, resolve_templates, shipped_list
from vlkr.errors import VlkrError


@pytest.mark.parametrize(
    ("name", "number", "functions"),
    [
        ("imagenet80", 80, open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("openai", 80, open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet7", 7, open_clip.SIMPLE_IMAGENET_TEMPLATES),
        ("simple", 7, open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ],
)
def test_open_clips_sets(name, number, functions):
    chosen = resolve_templates([name])
    assert chosen.name == f"{name} ({number})"
    filled = [template.replace("{c}", "tench") for template in chosen.templates]
    assert filled == [function("tench") for function in functions]


def test_files_strings_and_sets_are_joined(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a sketch of a {}.\n\n  art of a {c}, {} \n")
    joined = resolve_templates([str(path), "a {}", "a {c}!", "imagenet7"])
    assert joined.name == "mine.txt + given + imagenet7 (11)"
    assert joined.templates[:4] == ("a sketch of a {c}.", "art of a {c}, {}", "a {c}", "a {c}!")
    assert resolve_templates(["{c}"]) == TemplateSet("given (1)", ("{c}",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "list of templates is empty"),
        (["a photo"], r"template 'a photo' lacks the placeholder \{c\}, and is neither the name"),
        (["imagenet8"], "did you mean imagenet80"),
        ([""], "template '' lacks the placeholder"),
        (["EMPTY"], "holds no template"),
        (["BAD"], r"bad\.txt: template 'a photo' lacks the placeholder"),
        (["BINARY"], "cannot read templates"),
    ],
)
def test_wrong_templates(given, message, tmp_path):
    files = {"EMPTY": b"\n\n", "BAD": b"a {c}\na photo\n", "BINARY": b"\xff\xfe{c}"}
    paths = {}
    for name, content in files.items():
        paths[name] = tmp_path / f"{name.lower()}.txt"
        paths[name].write_bytes(content)
    with pytest.raises(VlkrError, match=message):
        resolve_templates([str(paths.get(entry, entry)) for entry in given])


def test_class_names_and_synsets_are_in_one_order():
    names = shipped_list("open_clip:IMAGENET_CLASSNAMES")
    synsets = shipped_list("timm:imagenet_synsets")
    assert names == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert synsets == tuple(ImageNetInfo().label_names())
    assert len(names) == len(synsets) == 1000
    assert (synsets[207], names[207]) == ("n02099601", "Golden Retriever")
    for name in ("imagenet_a", "imagenet_r"):
        indices = [int(index) for index in shipped_list(f"timm:{name}_indices")]
        assert len(indices) == 200
        assert [synsets[i] for i in indices] == list(shipped_list(f"timm:{name}_synsets"))


@pytest.mark.parametrize(
    "reference",
    ["", "timm:", "timm:nothing", "timm:../../x", "open_clip:create_model", "os:environ"],
)
def test_lists_that_do_not_exist(reference):
    with pytest.raises(VlkrError, match=f"no list '{reference}', expected open_clip:IMAGENET_CLA"):
        shipped_list(reference)


def test_lists_are_read_without_importing_their_packages():
    code = (
        "import sys; from vlkr.datasets import prompts;"
        "prompts.shipped_list('open_clip:IMAGENET_CLASSNAMES');"
        "prompts.shipped_list('timm:imagenet_synsets');"
        "print({'open_clip', 'timm', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
