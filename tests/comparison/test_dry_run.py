"""The plan's sizes against what is really computed, and without anything at hand."""

import pytest
import timm
from grids import compare, dg, transfer
from helpers import tree
from rich.console import Console
from safetensors.torch import save_file

from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.reporting.table import show


def test_sizes_are_those_that_the_cells_have(options, tmp_path):
    methods = ["zero-shot", "probe", "kradapter", "lora", "full", "bitfit"]
    planned = compare(tmp_path / "out", methods=methods, dry_run=True, **options)
    assert not (tmp_path / "out").exists()
    report = compare(tmp_path / "out", methods=methods, **options)
    rows = {row["method"]: row for row in planned.to_json()["plan"]}
    total = 0
    for outcome in report.results.selected:
        row = rows[outcome.entry.method]
        result = outcome.results[0]
        assert int(row["parameters"].replace(",", "")) == result.record["parameters"]
        assert int(row["measured images"]) == result.sets["colors"]["images"]
        assert int(row["cells"]) == len(outcome.results)
        log = result.folder.run / "logs" / "csv" / "metrics.csv"
        if log.is_file():
            lines = log.read_text().splitlines()
            column = lines[0].split(",").index("step")
            steps = 1 + max(int(line.split(",")[column]) for line in lines[1:])
            assert int(row["steps a cell"]) == steps
            total += steps * len(outcome.results)
            split = (result.folder.run / "split.jsonl").read_text()
            assert int(row["training images"]) == split.count('"train"')
        else:
            assert row["steps a cell"] == "0"
    assert planned.steps == total
    assert planned.cells == len(list(report.output.glob("cells/*/result.json")))


def test_class_embeddings_that_are_learnt_are_counted(options, tmp_path):
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model = {"model": "timm:test_vit", "pretrained": str(tmp_path / "weights.safetensors")}
    options = options | model | {"methods": ["lora"], "seeds": [1]}
    planned = compare(tmp_path / "out", dry_run=True, **options)
    [outcome] = compare(tmp_path / "out", **options).results.selected
    [row] = planned.to_json()["plan"]
    assert int(row["parameters"].replace(",", "")) == outcome.results[0].record["parameters"]


def test_steps_per_shot_spreads_them_over_the_epochs(options, tmp_path):
    """CLIP-LoRA trains 500 x shots iterations whatever the number of classes."""
    planned = compare(
        tmp_path / "out",
        methods=["lora"],
        shots=[1, 2],
        steps_per_shot=500,
        epochs=[10],
        dry_run=True,
        **options,
    )
    assert planned.table.rows[0][4] == "500 to 1,000"
    assert planned.steps == 2 * (500 + 1000)


def test_needs_neither_data_nor_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = compare(
        model="ViT-B-16",
        pretrained="openai",
        datasets=["data/nowhere"],
        methods=["zero-shot", "kradapter", "lora"],
        shots=[1, 16],
        dry_run=True,
    )
    # 12 + 12 blocks: q, k, v, out and twice the MLP, 768 and 512 wide.
    image = 4 * 43_008 + 2 * 108_288
    text = 4 * 23_552 + 2 * KR_512_2048
    assert planned.table.rows[1][2] == f"{12 * (image + text):,}"
    assert planned.table.rows[1][4] == planned.table.rows[1][5] == "unknown"
    assert planned.steps is None
    assert set(planned.missing) == {"data/nowhere"}
    assert not tree(tmp_path)
    missing = compare(
        model="local-dir:nowhere",
        data=DataConfig("digits"),
        methods=["kradapter"],
        dry_run=True,
    )
    assert missing.table.rows[0][2] == "unknown"
    assert [name.rpartition("/")[2] for name in missing.missing] == ["nowhere"]


KR_512_2048 = 512 * 22 + 512 * 94  # isqrt(512) = 22, ceil(2048 / 22) = 94


def test_other_grids(options, tmp_path, capsys):
    with pytest.raises(VlkrError, match="tree is not at hand; --data"):
        dg(data=DataConfig(root=tmp_path / "tree"), dry_run=True)
    planned = dg(
        data=DataConfig(root=tmp_path / "tree", domains=["a", "b", "c"]),
        methods=["kradapter"],
        dry_run=True,
    )
    assert planned.cells == 3 * 3
    found = transfer(
        data=DataConfig("digits"), datasets=["nowhere"], methods=["lora"], dry_run=True
    )
    show(found, Console(width=200))
    text = capsys.readouterr().out
    assert "Plan of vlkr transfer" in text
    assert "4 cells" in text
    assert "not at hand: nowhere" in text
    assert found.to_json()["ids"][0] == "digits-zero_shot"
    assert found.to_json()["plan"][1]["method"] == "lora"
