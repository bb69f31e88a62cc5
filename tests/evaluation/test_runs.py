import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import write_clip
from safetensors.torch import load_file

from vlkr.adapters import adapter_state_dict
from vlkr.datasets import load_dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.runs import home_and_shifts, load_run, run_dataset


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def change_config(folder, change):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_adapters_are_those_on_disk(run, colors):
    bundle, config = load_run(run)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    found = adapter_state_dict(bundle.model)
    assert {f"base_model.model.{key}" for key in found} == set(tensors)
    assert all(torch.equal(found[k.removeprefix("base_model.model.")], tensors[k]) for k in tensors)
    assert not bundle.model.training
    assert config["data"]["root"] == str(colors)


def test_dataset_has_the_runs_prompts_and_split(copy):
    change_config(copy, lambda c: c["data"].update(templates=["{c}!"], test_fraction=0.2))
    _, config = load_run(copy)
    dataset = run_dataset(config)
    assert dataset.templates == ("{c}!",)
    assert sum(1 for _ in dataset.source("test")) < sum(1 for _ in dataset.source("train")) / 2


def test_templates_of_a_card_by_name_and_others(colors):
    digits = load_dataset("digits")
    name, own = next(iter(digits.template_sets.items()))
    found = digits.with_templates([name])
    assert found.templates == tuple(own)
    assert found.template_set == f"{name} ({len(own)})"
    assert digits.with_templates(None) is digits
    named = load_dataset(colors).with_templates(["imagenet7", "{c}"])
    assert named.template_set == "imagenet7 + given (8)"
    with pytest.raises(VlkrError, match="neither the name of a set nor a file"):
        load_dataset(colors).with_templates([name])


def test_shifts_that_are_named_come_once():
    found = home_and_shifts(None, ["digits", "digits-blur"], True, None, 0.5)
    names = [dataset.name for dataset in found]
    assert names[:2] == ["digits", "digits-blur"]
    assert len(names) == len(set(names)) == 7
    assert len(home_and_shifts(None, ["digits"], False, None, 0.5)) == 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "no run folder at"),
        (lambda r: shutil.rmtree(r / "adapter"), "is not a finished run"),
        (lambda r: (r / "config.yaml").unlink(), "is not a finished run"),
        (lambda r: (r / "config.yaml").write_text("[1"), r"config\.yaml is not valid YAML"),
        (lambda r: (r / "config.yaml").write_text(""), r"config\.yaml holds nothing"),
        (lambda r: change_config(r, lambda c: c.pop("model")), "it lacks model"),
        (lambda r: change_config(r, lambda c: c["data"].pop("root")), r"it lacks data\.root"),
        (lambda r: change_config(r, lambda c: c.update(data=3)), r"it lacks data\.name"),
        (lambda r: change_config(r, lambda c: c["adapter"].pop("name")), r"lacks adapter\.name"),
        (lambda r: change_config(r, lambda c: c.update(model="zzz")), "unknown model 'zzz'"),
    ],
)
def test_folders_that_are_no_run(copy, harm, message):
    harm(copy)
    with pytest.raises(VlkrError, match=message):
        load_run(copy)


def test_adapter_of_another_base_is_refused(copy, tmp_path):
    other = write_clip(tmp_path / "other", seed=1)
    change_config(copy, lambda c: c.update(model=other))
    with pytest.raises(VlkrError, match="was made for another base"):
        load_run(copy)
