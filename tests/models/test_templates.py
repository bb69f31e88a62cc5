import open_clip
import pytest

from vlkr.errors import VlkrError
from vlkr.models.templates import TemplateSet, resolve_templates


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("imagenet80", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet7", open_clip.SIMPLE_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ],
)
def test_open_clips_sets(name, functions):
    found = resolve_templates([name])
    assert found.name == f"{name} ({len(functions)})"
    filled = [template.replace("{c}", "tench") for template in found.templates]
    assert filled == [function("tench") for function in functions]


def test_the_number_of_templates():
    assert len(resolve_templates(["imagenet80"]).templates) == 80
    assert len(resolve_templates(["imagenet7"]).templates) == 7


def test_files_strings_and_sets_are_joined(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a sketch of a {}.\n\n  art of a {c}, {} \n")
    found = resolve_templates([str(path), "a {}", "a {c}!", "imagenet7"])
    assert found.name == "mine.txt + given + imagenet7 (11)"
    assert found.templates[:4] == ("a sketch of a {c}.", "art of a {c}, {}", "a {c}", "a {c}!")


def test_one_template():
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
