"""Leave one domain out: who trains on what, who is tested on what, who chooses by what."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
from grids import dg
from safetensors.numpy import load_file

from vlkr.comparison.dg import RULES, dg_plan
from vlkr.comparison.options import GridConfig, MethodConfig
from vlkr.comparison.results import read_results
from vlkr.datasets import DataConfig
from vlkr.errors import VlkrError
from vlkr.files import write_json

DOMAINS = ["one", "three", "two"]
METHODS = ["zero-shot", MethodConfig("kradapter", lrs=[1e-3, 3e-2]), "lora"]


@pytest.fixture(scope="module")
def grid(options, domains):
    return options | {"data": replace(options["data"], root=domains), "methods": METHODS}


@pytest.fixture(scope="module")
def report(grid, tmp_path_factory):
    return dg(tmp_path_factory.mktemp("dg") / "out", **grid)


def plan_of(grid, selection):
    data = replace(grid["data"], test_fraction=0.2, val_fraction=0.0)
    return dg_plan(GridConfig(**grid), data, DOMAINS, selection)


def keys(dataset, split="test"):
    return {sample.key for sample in dataset.source(split)}


@pytest.mark.parametrize("selection", list(RULES))
def test_no_cell_trains_on_what_it_is_tested_on(grid, selection):
    """Down to the images' keys; and validation sees the test domain under the oracle alone."""
    plan = plan_of(grid, selection)
    for entry in plan.entries:
        test = entry.place["domain"]
        cells = {cell.id: cell for cell in plan.cells}
        for candidate in entry.candidates:
            for name in candidate.cells:
                cell = cells[name]
                if cell.seed is None:
                    continue
                trained = keys(cell.config.data.load(), "train")
                assert all(not key.startswith(f"{test}/") for key in trained)
                measured = {chosen.name: keys(chosen.load()) for chosen in cell.sets}
                assert {key.split("/")[0] for key in measured[test]} == {test}
                if selection != "leave-one-domain-out":
                    validating = measured["(validation)"]
                    assert not validating & (trained | measured[test])
                    seen = {key.split("/")[0] for key in validating}
                    assert seen == ({test} if selection == "oracle" else set(DOMAINS) - {test})
            for reading in candidate.readings:
                if selection == "leave-one-domain-out" and len(entry.candidates) > 1:
                    trained = keys(cells[reading.cell].config.data.load(), "train")
                    assert {key.split("/")[0] for key in trained} == (
                        set(DOMAINS) - {test, reading.set}
                    )


def test_numbers_of_cells(grid):
    assert len(plan_of(grid, "training-domain").cells) == 1 + 3 * 2 * 2 + 3 * 2
    # Pairs of domains only where there is something to choose: 3 pairs, 2 rates, 2 seeds.
    assert len(plan_of(grid, "leave-one-domain-out").cells) == 1 + 3 * 2 * 2 + 3 * 2 * 2 + 3 * 2
    ids = [cell.id for cell in plan_of(grid, "leave-one-domain-out").cells]
    assert len(set(ids)) == len(ids)


def test_table_is_that_of_the_predictions(report):
    [table] = [t for t in report.tables() if "one domain left out" in t.title]
    assert table.header == ("test domain, top-1 %", "zero-shot", "kradapter", "lora")
    rows = {row[0]: row[3] for row in table.rows}
    each = []
    for domain in DOMAINS:
        values = []
        for seed in (1, 2):
            folder = report.output / "cells" / f"without-{domain}-lora-lr0.01-epochs1-seed{seed}"
            said = load_file(folder / "predictions.safetensors")
            values.append(float((said[f"{domain}.labels"] == said[f"{domain}.predicted"]).mean()))
        each.append(values)
        assert rows[domain] == (
            f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
        )
    means = np.mean(each, axis=0)
    assert rows["mean of 3 domains"] == f"{100 * means.mean():.1f} ± {100 * means.std(ddof=1):.1f}"
    lowest = min(each, key=statistics.mean)
    assert rows["worst domain"].split()[0] == f"{100 * statistics.mean(lowest):.1f}"


@pytest.mark.parametrize("selection", list(RULES))
def test_rule_chooses_and_is_named(grid, tmp_path, selection):
    """Cells with made-up accuracies: validation favours one rate, the test domain the other."""
    plan = plan_of(grid, selection)
    for cell in plan.cells:
        good = "lr0.03" in cell.id
        left_out = cell.id.split("-")[1:3] if cell.id.startswith("without") else []
        is_pair = len([d for d in left_out if d in DOMAINS]) == 2
        results = []
        for chosen in cell.sets:
            validates = chosen.name == "(validation)" or is_pair
            value = float(good) if validates else float(not good)
            results.append({"dataset": chosen.name, "metrics": {"acc1": value}})
        folder = tmp_path / "cells" / cell.id
        folder.mkdir(parents=True)
        found = {"weights_sha256": "0", "val_acc1": None, "results": results}
        write_json(folder / "result.json", found)
    found = read_results(plan, tmp_path)
    chosen = [o.chosen.setting["lr"] for o in found.selected if o.entry.method == "kradapter"]
    assert chosen == [3e-2] * 3
    assert found.plan.context["model selection"] == RULES[selection]


def test_every_table_of_accuracies_names_the_rule(report):
    for table in report.tables():
        if table.title != "Cost":
            assert RULES["training-domain"] in table.note
    assert RULES["training-domain"] in report.lines()[0]
    assert RULES["training-domain"] in (report.output / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig()}, "no dataset"),
        ({"selection": "leave-one-domain-out"}, r"has 2 domains, expected 3 or more"),
    ],
)
def test_refuses(grid, domains, tmp_path, changes, message):
    data = DataConfig(root=domains, domains=["one", "two"])
    with pytest.raises(VlkrError, match=message):
        dg(tmp_path / "out", **(grid | {"data": data} | changes))
    assert not (tmp_path / "out").exists()


def test_refuses_a_dataset_without_domains(options, tmp_path):
    with pytest.raises(VlkrError, match="'colors' has no domains, expected 2 or more"):
        dg(tmp_path / "out", **options)


def test_the_part_that_is_held_out_has_one_name(grid, tmp_path):
    data = replace(grid["data"], test_fraction=0.4)
    with pytest.raises(VlkrError, match=r"data\.test_fraction 0\.4 does not go with dg, whose"):
        dg(tmp_path / "out", **(grid | {"data": data}))
