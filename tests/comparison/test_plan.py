"""Cells as they are kept on disk: a grid of an earlier version is recognized."""

import json

import pytest

from vlkr.comparison.plan import Cell

# cell.json of version 0.1 for an adapter, zero-shot and a run, and the hashes it recorded.
DIGITS = {
    "name": "digits",
    "root": None,
    "shots": 16,
    "templates": None,
    "test_fraction": 0.5,
    "batch_size": 32,
    "min_steps_per_epoch": 10,
    "num_workers": 3,
    "crop_scale": [0.5, 1.0],
    "flip": True,
    "classes_per_step": None,
    "domains": None,
    "classes": "all",
    "fraction": None,
    "val_fraction": None,
    "per_domain": False,
    "split_file": None,
    "max_bad": 0,
    "memory_gb": 4.0,
    "shuffle_buffer": 1024,
    "allow_commands": False,
}
COLORS = DIGITS | {
    "name": None,
    "root": "/data/colors",
    "shots": 2,
    "batch_size": 8,
    "min_steps_per_epoch": 2,
}
ZERO_SHOT = {
    "id": "colors-zero_shot",
    "kind": "zero-shot",
    "model": "tiny",
    "pretrained": None,
    "data": COLORS,
    "sets": [{"name": "colors", "data": COLORS, "split": "test"}],
    "seed": None,
    "adapter": {
        "name": "kradapter",
        "targets": ["q", "k", "v", "out", "fc1", "fc2"],
        "towers": ["visual", "text"],
        "blocks": None,
        "options": {},
        "match": None,
    },
    "match_options": {},
    "optimizer": {"lr": 0.001, "weight_decay": 0.1, "warmup_steps": 0, "grad_clip": 1.0},
    "trainer": {
        "epochs": 10,
        "precision": "32-true",
        "accelerator": "auto",
        "devices": 1,
        "num_nodes": 1,
        "accumulate_grad_batches": 1,
        "progress": True,
    },
    "run": None,
    "run_sha256": None,
}
RUN = ZERO_SHOT | {
    "id": "colors-run-kradapter-seed1-1",
    "kind": "run",
    "pretrained": "openai",
    "seed": 1,
    "run": "/runs/a",
    "run_sha256": "01 23",
}
ADAPTER = ZERO_SHOT | {
    "id": "colors-shots2-lora-lr0.01-epochs1-seed2",
    "kind": "adapter",
    "model": "local-dir:/models/clip",
    "sets": [*ZERO_SHOT["sets"], {"name": "digits", "data": DIGITS, "split": "train"}],
    "seed": 2,
    "adapter": {
        "name": "lora",
        "targets": ["q", "v"],
        "towers": ["visual"],
        "blocks": [-1],
        "options": {"alpha": 4.0},
        "match": "kradapter",
    },
    "match_options": {"num_terms": 2},
    "optimizer": ZERO_SHOT["optimizer"] | {"lr": 0.01},
    "trainer": ZERO_SHOT["trainer"] | {"epochs": 1, "accelerator": "cpu", "progress": False},
}


@pytest.mark.parametrize(
    ("value", "sha256"),
    [
        (ADAPTER, "60baf23374067e6314a07bc0e599e77e086ca82bb4a8d0378a94e65830494dc0"),
        (ZERO_SHOT, "c89ecc967b03ddb61d17b16ac7172a4c56150c45f94196834c65c0709c71cb0f"),
        (RUN, "838f707fe6ed1f63f7e9837644ae35cf072df02205174424352df7871c27dd4e"),
    ],
)
def test_cells_of_the_previous_version_keep_their_hash(value, sha256):
    cell = Cell.from_json(json.loads(json.dumps(value)))
    assert cell.hash == sha256
    assert cell.to_json() == value


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("model", True),
        ("seed", True),
        ("data.shots", True),
        ("data.max_bad", True),
        ("adapter.targets", True),
        ("optimizer.lr", True),
        ("trainer.epochs", True),
        ("match_options", True),
        ("run_sha256", True),
        ("id", False),
        ("data.num_workers", False),
        ("trainer.accelerator", False),
        ("trainer.progress", False),
    ],
)
def test_the_hash_covers_what_the_result_depends_on(key, changed):
    value = json.loads(json.dumps(ADAPTER))
    *sections, name = key.split(".")
    part = value[sections[0]] if sections else value
    others = {bool: True, int: 7, float: 0.5, str: "other", list: ["out"], dict: {"rank": 3}}
    part[name] = others.get(type(part[name]), "other")
    assert (Cell.from_json(value).hash != Cell.from_json(ADAPTER).hash) == changed
