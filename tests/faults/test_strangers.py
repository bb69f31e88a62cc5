"""Files and names from strangers: data is read or refused, nothing is run, nothing steers."""

import io
import json
import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import color_image, small_run, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vlkr.cli import main
from vlkr.datasets import load_dataset
from vlkr.datasets.cards import load_card
from vlkr.datasets.images import decode_image
from vlkr.datasets.samples import Sample, good_samples
from vlkr.datasets.splits import read_split
from vlkr.errors import VlkrError
from vlkr.evaluation.metrics import Confused, DatasetResult
from vlkr.evaluation.report import Evaluation
from vlkr.files import read_json, read_yaml
from vlkr.models.clip import load_clip
from vlkr.reporting.page import html_page
from vlkr.reporting.table import Table, show
from vlkr.runs import RunFolder

pytestmark = pytest.mark.faults

CONFIGS = "hostile files: configuration"
NAMES = "hostile names"
MODELS = "hostile files: model"


class Bomb:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


CONFIG_TEXTS = [
    "data: !!python/object/apply:os.mkdir ['{path}']\n",
    "output: !!python/object/new:os.mkdir ['{path}']\n",
    "adapter: {{class_path: os.mkdir, init_args: {{path: '{path}'}}}}\n",
    "data: {{class_path: pathlib.Path.mkdir, init_args: {{self: '{path}'}}}}\n",
    "optimizer: {{class_path: vlkr.config.TrainerConfig}}\n",
    "__path__: x\n",
    "config: {{config: 1}}\n",
    "adapter: {{options: {{rank: !!python/name:os.system }}}}\n",
    "adapter: {{options: !!python/tuple [1]}}\n",
    "a: &a [x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n"
        for p, n in zip("abcdefg", "bcdefgh", strict=True)
    ),
    "a: &a [*a]\n",
    "[" * 20_000,
    "model: !!timestamp x\n",
    "model: !!int ''\n",
    "model: !!bool x\n",
    "model: !!binary '\x01'\n",
    "? {{a: 1}}\n: 2\n",
    "model: " + "9" * 10_000 + "\n",
]


@pytest.mark.parametrize("text", CONFIG_TEXTS)
def test_a_configuration_makes_no_objects(tmp_path, case, capsys, text):
    config = tmp_path / "config.yaml"
    config.write_text(text.format(path=tmp_path / "executed"))
    with case(CONFIGS):
        code = main(["adapt", f"--config={config}", f"--output={tmp_path / 'run'}"])
        assert code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("vlkr: error: ")
        assert len(line) < 3000
        assert not (tmp_path / "executed").exists()
        assert not (tmp_path / "run").exists()


def test_options_make_no_objects(tmp_path, case, capsys):
    target = tmp_path / "executed"
    for option in (
        f'--adapter={{"class_path": "os.mkdir", "init_args": {{"path": "{target}"}}}}',
        f"--adapter.options=!!python/object/apply:os.mkdir ['{target}']",
        "--adapter=os.mkdir",
        "--data.class_path=os.mkdir",
    ):
        with case(CONFIGS):
            assert main(["adapt", option, f"--output={tmp_path / 'run'}"]) == 2
            assert not target.exists()
            assert not (tmp_path / "run").exists()
    capsys.readouterr()


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_pickled_weights_of_a_folder_are_never_run(tmp_path, small, case, name):
    source = Path(small.removeprefix("local-dir:"))
    folder = tmp_path / "clip"
    folder.mkdir()
    shutil.copy(source / "open_clip_config.json", folder)
    torch.save({"visual.proj": Bomb(tmp_path / "executed")}, folder / name)
    with case(MODELS):
        with pytest.raises(VlkrError, match="cannot load model"):
            load_clip(f"local-dir:{folder}")
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["pt", "bin", "pth", "ckpt", "safetensors"])
def test_pickled_weights_of_a_name_are_never_run(tmp_path, case, suffix):
    path = tmp_path / f"weights.{suffix}"
    torch.save({"state_dict": Bomb(tmp_path / "executed")}, path)
    with case(MODELS):
        with pytest.raises(VlkrError, match="cannot load model"):
            load_clip("RN50", str(path))
        assert not (tmp_path / "executed").exists()


EVIL = "x\x1b[31m[bold red]<script>alert(1)</script>|\n# [a](javascript:1) \x07\u202eevil"


def evaluation():
    result = DatasetResult(
        EVIL,
        "test",
        4,
        EVIL,
        {"acc1": 0.5},
        worst_confusions=[Confused(EVIL, EVIL, 2, 0.5)],
        class_names=(EVIL, "b"),
    )
    return Evaluation([result, result, result], {"model": EVIL, "options": {EVIL: EVIL}})


def test_names_do_not_steer_a_terminal(case):
    output = io.StringIO()
    with case(NAMES):
        show(evaluation(), Console(file=output, width=300))
        text = output.getvalue()
        assert "[bold red]" in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_names_do_not_steer_a_markdown_page(case):
    with case(NAMES):
        text = evaluation().markdown()
        assert "<script>" not in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert "\n# [a]" not in text
        # A row of a table has as many cells as its header, whatever the names hold.
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows[:3]}) == 1


def test_names_do_not_steer_a_web_page(case):
    with case(NAMES):
        table = Table(EVIL, ("a", EVIL), ((EVIL, "1"),), EVIL)
        text = html_page(EVIL, EVIL, [table], {EVIL: b"png"})
        assert "<script>alert" not in text
        assert text.count("<script>") == 1


def test_names_do_not_steer_error_messages(case, capsys, tmp_path):
    with case(NAMES):
        assert main(["adapt", f"--model={EVIL}", f"--output={tmp_path / 'run'}"]) == 2
        error = capsys.readouterr().err.rstrip("\n")
        assert not {"\x1b", "\x07", "\u202e", "\n"} & set(error)


def test_names_of_classes_do_not_steer_a_run(tmp_path, small, case, capsys):
    names = ["red\x1b[2J", "[link=x]green", "<b>blue</b>|"]
    root = write_shards(tmp_path / "shards", shards=1)
    (root / "classnames.txt").write_text("\n".join(names))
    with case(NAMES):
        result = small_run(tmp_path / "run", small, root)
        result.show(Console(width=200))
        assert "\x1b[2J" not in capsys.readouterr().out
        report = (tmp_path / "run" / "report.md").read_text()
        assert "<b>" not in report
        assert "\x1b" not in report


FUZZ = "fuzz: readers"
FEW = settings.get_profile("drill").max_examples // 5
TEXTS = st.binary(max_size=300) | st.text(max_size=200).map(str.encode)
JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["train", "val", "impath", "path", "label", "format", "class_names", "key", "part"]
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings.get_profile("drill")
@given(content=TEXTS | JSON_LIKE.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_file_of_settings(tmp_path_factory, case, content):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(content)
    for read in (read_json, read_yaml):
        with case(FUZZ), suppress(VlkrError):
            read(path)
    path.unlink()


@settings.get_profile("drill")
@given(
    lines=st.lists(JSON_LIKE.map(json.dumps) | st.text(max_size=20), max_size=4),
    starts=st.booleans(),
    whole=TEXTS | JSON_LIKE.map(lambda value: json.dumps(value).encode()),
)
def test_any_bytes_as_a_split(tmp_path_factory, case, lines, starts, whole):
    folder = tmp_path_factory.mktemp("fuzz")
    header = '{"format": "vlkr split 1", "class_names": ["a", "b"]}'
    (folder / "a.jsonl").write_text("\n".join([header] * starts + lines), errors="replace")
    (folder / "a.json").write_bytes(whole)
    for name in ("a.jsonl", "a.json"):
        with case(FUZZ), suppress(VlkrError):
            read_split(folder / name)
    shutil.rmtree(folder)


@settings.get_profile("drill")
@given(data=st.data())
def test_any_bytes_as_a_card(tmp_path_factory, case, data):
    folder = tmp_path_factory.mktemp("fuzz")
    card = {
        "name": "c",
        "title": "t",
        "source": "s",
        "licence": "l",
        "class_names": ["a", "b"],
        "templates": ["a {c}."],
        "splits": {"test": 1},
    }
    for key in data.draw(st.lists(st.sampled_from([*card, "shards", "shifts", "x"]), max_size=3)):
        card[key] = data.draw(JSON_LIKE)
    text = json.dumps(card) if data.draw(st.booleans()) else data.draw(st.text(max_size=200))
    (folder / "data").mkdir()
    (folder / "data" / "c.yaml").write_text(text, errors="replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlkr.datasets.cards.resource", lambda name: folder / name)
        with case(FUZZ), suppress(VlkrError):
            load_card("c")
    shutil.rmtree(folder)


@settings.get_profile("drill")
@given(data=st.data())
def test_any_bytes_as_a_shard(tmp_path_factory, case, data):
    root = tmp_path_factory.mktemp("fuzz") / "shards"
    write_shards(root, per_class=1, shards=1)
    path = root / "test" / "0.tar"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 600))] = data.draw(st.binary(max_size=40))
    path.write_bytes(content if data.draw(st.booleans()) else data.draw(st.binary(max_size=2000)))
    with case(FUZZ), suppress(VlkrError):
        samples = load_dataset(root).source("test")
        for sample in good_samples(samples):
            decode_image(sample)
    shutil.rmtree(root.parent)


@settings.get_profile("drill")
@given(data=st.data())
def test_any_bytes_as_an_image(case, data):
    content = bytearray(color_image("red", 0))
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    with case(FUZZ), suppress(VlkrError):
        decode_image(Sample("key", bytes(content), 0))


@settings(settings.get_profile("drill"), max_examples=FEW)
@given(data=st.data())
def test_any_configuration_of_a_run(tmp_path_factory, case, data):
    run = tmp_path_factory.mktemp("fuzz")
    (run / "adapter").mkdir()
    config = {
        "model": "tiny",
        "pretrained": None,
        "adapter": {"name": "lora", "options": {}},
        "data": {
            "name": "digits",
            "root": None,
            "shots": 2,
            "templates": None,
            "test_fraction": 0.5,
            "crop_scale": [0.5, 1],
        },
        "seed": 1,
    }
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([config, config["data"]]))
        place[data.draw(st.sampled_from([*place, "x"]))] = data.draw(JSON_LIKE)
        if not isinstance(config["data"], dict):
            break
    (run / "config.yaml").write_text(json.dumps(config))
    with case(FUZZ), suppress(VlkrError):
        RunFolder.open(run).dataset()
    shutil.rmtree(run)


HOSTILE_MEMBERS = {
    "a path out of the tar": tarfile.TarInfo("../evil.png"),
    "an absolute path": tarfile.TarInfo("/tmp/evil.png"),
}
for kind, label in (
    (tarfile.SYMTYPE, "a symbolic link"),
    (tarfile.LNKTYPE, "a hard link"),
    (tarfile.FIFOTYPE, "a pipe"),
    (tarfile.CHRTYPE, "a device"),
):
    member = tarfile.TarInfo("x.png")
    member.type, member.linkname = kind, "/etc/passwd"
    HOSTILE_MEMBERS[label] = member


@pytest.mark.parametrize("hostile", HOSTILE_MEMBERS.values(), ids=list(HOSTILE_MEMBERS))
def test_a_hostile_tar_is_refused(tmp_path, case, hostile):
    root = write_shards(tmp_path / "shards", shards=1)
    with tarfile.open(root / "test" / "0.tar", "w") as archive:
        archive.addfile(hostile)
    with case("hostile files: shards"), pytest.raises(VlkrError, match=r"0\.tar"):
        list(load_dataset(root).source("test"))


def test_pickles_of_a_shard_are_passed_over(tmp_path, case):
    import pickle

    root = write_shards(tmp_path / "shards", shards=1, per_class=1)
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    with tarfile.open(root / "test" / "0.tar", "w") as archive:
        fields = (("png", color_image("red", 0)), ("cls", b"0"), ("pkl", bomb), ("pyd", bomb))
        for extension, content in fields:
            member = tarfile.TarInfo(f"a.{extension}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with case("hostile files: shards"):
        assert [s.key for s in load_dataset(root).source("test")] == ["a"]
        assert not (tmp_path / "executed").exists()


def test_a_decompression_bomb_is_refused(case):
    header = b"P6 60000 60000 255\n"
    with case("hostile files: images"):
        assert "pixels" in str(decode_image(Sample("bomb", header, 0)))
