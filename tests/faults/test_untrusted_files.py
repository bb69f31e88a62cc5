"""Untrusted files and names: data is read or refused, and no content is run or interpreted."""

import dataclasses
import io
import json
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from helpers import color_image, records_of_tar, small_run, write_shards
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from vlkr.cli import main
from vlkr.datasets import load_dataset
from vlkr.datasets.cards import load_card
from vlkr.datasets.images import decode_image
from vlkr.datasets.samples import BadSample, Sample
from vlkr.datasets.split_files import read_split
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
        show(result, Console(width=200))
        assert "\x1b[2J" not in capsys.readouterr().out
        report = (tmp_path / "run" / "report.md").read_text()
        assert "<b>" not in report
        assert "\x1b" not in report


FUZZ = "fuzz: readers"
FEW = settings.get_profile("drill").max_examples // 5
TEXTS = st.binary(max_size=300) | st.text(max_size=200).map(str.encode)
FIELD_NAMES = ["train", "val", "impath", "path", "label", "format", "class_names", "key", "part"]
JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELD_NAMES) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(st.text(max_size=5), JSON_LIKE, max_size=5)


@settings.get_profile("drill")
@given(content=TEXTS | (JSON_LIKE | MAPPINGS).map(lambda value: json.dumps(value).encode()))
@example(content=b'{"a": [1, "b", null]}')
def test_any_bytes_as_a_file_of_settings(tmp_path, case, read, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    for reader, other in ((read_json, json.loads), (read_yaml, yaml.safe_load)):
        try:
            expected = other(path.read_text("utf-8"))
        except Exception:  # whatever other readers stumble over
            expected = None
        with case(FUZZ):
            value = read(reader, path)
            assert repr(value) == repr(expected if isinstance(expected, dict) else None)


ENTRIES = [
    {"key": f"red/{i}.png", "label": i % 2, "part": "train" if i < 3 else "val"} for i in range(4)
]


def is_entry(entry):
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("key"), str)
        and type(entry.get("label")) is int
        and entry.get("part") in ("train", "val")
    )


def check_split(split, entries):
    """Entries that are well formed must be read, and what is read must be the entries."""
    if split is None:
        assert not all(map(is_entry, entries))
        return
    for part in ("train", "val"):
        expected = [(e["key"], e["label"]) for e in entries if e["part"] == part]
        assert [(p.key, p.label) for p in split.picks.get(part, [])] == [
            (str(key), int(label)) for key, label in expected
        ]


@settings.get_profile("drill")
@given(data=st.data())
def test_any_bytes_as_a_split(tmp_path, case, read, data):
    entries = [dict(entry) for entry in ENTRIES]
    for name in data.draw(st.lists(st.sampled_from(["key", "label", "part", "x"]), max_size=2)):
        data.draw(st.sampled_from(entries))[name] = data.draw(JSON_LIKE)
    lines = [json.dumps(entry) for entry in entries]
    if data.draw(st.integers(0, 3)) == 0:
        value = data.draw(JSON_LIKE)
        entries.append(value)
        lines.append(json.dumps(value))
    header = '{"format": "vlkr split 1", "class_names": ["a", "b"]}'
    (tmp_path / "a.jsonl").write_text("\n".join([header, *lines]))
    with case(FUZZ):
        check_split(read(read_split, tmp_path / "a.jsonl"), entries)
    if all(map(is_entry, entries)):
        parts = {p: [e for e in entries if e["part"] == p] for p in ("train", "val")}
        coop = {p: [[e["key"], e["label"], "x"] for e in part] for p, part in parts.items()}
        (tmp_path / "a.json").write_text(json.dumps(coop))
        with case(FUZZ):
            check_split(read(read_split, tmp_path / "a.json"), entries)


@settings.get_profile("drill")
@given(
    lines=st.lists(JSON_LIKE.map(json.dumps) | st.text(max_size=20), min_size=1, max_size=4),
    whole=TEXTS | JSON_LIKE.map(lambda value: json.dumps(value).encode()),
)
def test_garbage_is_not_a_split(tmp_path, case, lines, whole):
    (tmp_path / "a.jsonl").write_text("\n".join(lines), errors="replace")
    (tmp_path / "a.json").write_bytes(whole)
    for name in ("a.jsonl", "a.json"):
        with case(FUZZ), pytest.raises(VlkrError, match=name):
            read_split(tmp_path / name)


CARD = {
    "name": "c",
    "title": "t",
    "source": "s",
    "licence": "l",
    "class_names": ["a", "b"],
    "templates": {"own": ["a {c}."]},
    "splits": {"test": 1},
}


@settings.get_profile("drill")
@given(data=st.data())
def test_any_bytes_as_a_card(tmp_path, case, read, data):
    values = dict(CARD)
    for key in data.draw(st.lists(st.sampled_from([*CARD, "shards", "shifts", "x"]), max_size=3)):
        values[key] = data.draw(JSON_LIKE)
    is_garbage = data.draw(st.integers(0, 3)) == 0
    text = data.draw(st.text(max_size=200)) if is_garbage else json.dumps(values)
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "c.yaml").write_text(text, errors="replace")
    with pytest.MonkeyPatch.context() as patch, case(FUZZ):
        patch.setattr("vlkr.datasets.cards.resource", lambda name: tmp_path / name)
        card = read(load_card, "c")
        assert card is not None or is_garbage or values != CARD
        if card is not None:
            given = yaml.safe_load(text)
            given["templates"] = as_templates(given["templates"])
            read_back = json.loads(json.dumps(dataclasses.asdict(card)))
            assert {key: read_back[key] for key in given} == json.loads(json.dumps(given))


def as_templates(templates):
    return {"c card": templates} if isinstance(templates, list) else templates


@settings.get_profile("drill")
@given(data=st.data())
def test_any_bytes_as_a_shard(tmp_path, case, read, data):
    root = tmp_path / "shards"
    shutil.rmtree(root, ignore_errors=True)
    write_shards(root, per_class=1, shards=1)
    path = root / "test" / "0.tar"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        start, new = data.draw(st.integers(0, len(content))), data.draw(st.binary(max_size=40))
        length = data.draw(st.just(len(new)) | st.integers(0, 600))
        content[start : start + length] = new
    is_garbage = data.draw(st.integers(0, 3)) == 0
    path.write_bytes(data.draw(st.binary(max_size=2000)) if is_garbage else content)
    with case(FUZZ):
        samples = read(lambda: list(load_dataset(root).source("test")))
        if samples is not None:
            records = records_of_tar(path)
            assert [s.key for s in samples] == [key for key, _ in records]
            for sample, (_, fields) in zip(samples, records, strict=True):
                if not isinstance(sample, BadSample):
                    assert (sample.image, sample.label) == (fields["png"], int(fields["cls"]))
                    check_image(decode_image(sample), sample.image)


@settings.get_profile("drill")
@given(data=st.data())
def test_any_bytes_as_an_image(case, read, data):
    content = bytearray(color_image("red", 0))
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    with case(FUZZ):
        image = read(decode_image, Sample("key", bytes(content), 0))
        check_image(image, bytes(content))


def check_image(image, content):
    """Pillow, which reads more formats, must give the same pixels or refuse as well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGB")
    except Exception:  # whatever Pillow's parsers stumble over
        expected = None
    if image is None or isinstance(image, BadSample):
        assert expected is None
    else:
        assert image.tobytes() == expected.tobytes()


@settings(settings.get_profile("drill"), max_examples=FEW)
@given(data=st.data())
def test_any_configuration_of_a_run(tmp_path_factory, case, read, data):
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
    changes = data.draw(st.integers(0, 3))
    for _ in range(changes):
        place = data.draw(st.sampled_from([config, config["data"]]))
        place[data.draw(st.sampled_from([*place, "x"]))] = data.draw(JSON_LIKE)
        if not isinstance(config["data"], dict):
            break
    (run / "config.yaml").write_text(json.dumps(config))
    with case(FUZZ):
        dataset = read(lambda: RunFolder.open(run).dataset())
        assert changes or dataset == load_dataset("digits")
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
