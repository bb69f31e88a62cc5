"""Adapter folders, and adapters that other software wrote.

Damaged and hostile folders are tried in ``faults/test_adapter_folders.py``.
"""

import hashlib
import json

import peft
import pytest
import safetensors.torch
import torch
from helpers import assert_near
from torch import nn

from vlkr.adapters import (
    add_adapters,
    load_adapter,
    load_authors_kradapter,
    merge_and_unload,
    merged,
    save_adapter,
    set_adapter_scale,
)
from vlkr.adapters.hosts import weights_hash
from vlkr.errors import VlkrError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(hosts, adapt, tmp_path):
    """An adapted attention block, its base and the folder that it was saved to."""
    host = hosts["mha-split"]
    model, base, _ = adapt(host.build(), "lora", targets=host.targets)
    folder = tmp_path / "adapter"
    save_adapter(model, folder, base_model="a block")
    return model, base, folder


def sealed(config, folder):
    """The config with the hashes of the files as they are now."""
    config |= {"model_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
    config.pop("config_sha256", None)
    text = json.dumps(config, sort_keys=True)
    return config | {"config_sha256": hashlib.sha256(text.encode()).hexdigest()}


def edit_config(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    replaced = change(config)
    config = config if replaced is None else replaced
    (folder / CONFIG).write_text(json.dumps(sealed(config, folder)))


def edit_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    edit_config(folder, lambda config: None)


def assert_refused(base, folder, *named):
    types = [type(m) for m in base.modules()]
    trainable = [p.requires_grad for p in base.parameters()]
    with pytest.raises(VlkrError) as error:
        load_adapter(base, folder)
    assert [type(m) for m in base.modules()] == types
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert "\n" not in str(error.value)
    for words in named:
        assert words in str(error.value)


def test_round_trip_gives_the_same_outputs_tensors_and_folder(saved, tmp_path):
    model, base, folder = saved
    x = torch.randn(2, 5, 8)
    load_adapter(base, folder)
    assert torch.equal(base(x), model(x))
    (tmp_path / "again").mkdir()  # an empty folder is filled
    save_adapter(base, tmp_path / "again", base_model="a block")
    assert contents(tmp_path / "again") == contents(folder)
    for one, other in zip(base.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad


def test_folder_has_pefts_layout(saved):
    _, base, folder = saved
    assert set(contents(folder)) == {CONFIG, WEIGHTS, "README.md"}
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "a block"
    assert config["base_model_sha256"] == weights_hash(base)
    assert config["options"]["rank"] == 3
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    assert set(tensors) == {
        f"base_model.model.0.attn.{slot}.{factor}"
        for slot in ("q", "k", "v", "out")
        for factor in ("lora_A", "lora_B")
    }


def test_adapters_of_a_bare_linear_round_trip(adapt, tmp_path):
    model, base, _ = adapt(nn.Linear(12, 8), "lora", targets=["*"])
    save_adapter(model, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    x = torch.randn(3, 12)
    assert torch.equal(base(x), model(x))


def test_one_of_two_adapters_is_saved_by_name(saved, disturb, tmp_path):
    model, base, folder = saved
    add_adapters(model, "kradapter", targets=["v"], adapter_name="second")
    disturb(model)
    save_adapter(model, tmp_path / "second", adapter_name="second")
    load_adapter(base, tmp_path / "second", adapter_name="x")
    assert {name for name, _ in base.named_parameters() if ".adapters." in name} == {
        "0.attn.adapters.x.v.u",
        "0.attn.adapters.x.v.v",
    }
    load_adapter(base, folder)
    with pytest.raises(VlkrError, match="'third'"):
        save_adapter(model, tmp_path / "third", adapter_name="third")
    assert not (tmp_path / "third").exists()


def test_saving_within_a_merged_block_is_refused(saved, tmp_path):
    model, _, _ = saved
    with merged(model), pytest.raises(VlkrError, match="cannot save merged"):
        save_adapter(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_scale_is_saved(saved, tmp_path):
    model, base, _ = saved
    set_adapter_scale(model, 0.5)
    save_adapter(model, tmp_path / "half")
    load_adapter(base, tmp_path / "half")
    x = torch.randn(2, 5, 8)
    assert torch.equal(base(x), model(x))


def test_another_base_is_refused_unless_allowed(saved):
    _, base, folder = saved
    with torch.no_grad():
        base[0].attn.out_proj.weight[0, 0] += 1e-3
    assert_refused(base, folder, str(folder), "different base", "a block", weights_hash(base)[:12])
    load_adapter(base, folder, check_base=False)


def test_what_does_not_fit_is_refused(saved, tmp_path):
    model, base, folder = saved
    assert_refused(model, folder, "'default'")
    assert_refused(nn.Sequential(nn.Linear(8, 8)), folder, str(folder), "0.attn", "a block")
    merge_and_unload(model)
    assert_refused(model, folder, "different base")
    assert_refused(base, tmp_path / "missing", str(tmp_path / "missing"))
    assert_refused(base, folder / CONFIG, str(folder / CONFIG))
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
        assert_refused(base, folder, str(folder / name))


def module(**changes):
    def change(config):
        config["modules"][0].update(changes)

    return change


CONFIG_EDITS = {
    "no method": (lambda c: {k: v for k, v in c.items() if k != "peft_type"}, "adapter"),
    "unknown method": (lambda c: c.update(peft_type="LOTA"), "'lota'"),
    "method of another type": (lambda c: c.update(peft_type=["LORA"]), "lora"),
    "no options": (lambda c: {k: v for k, v in c.items() if k != "options"}, "options"),
    "options of another type": (lambda c: c.update(options=[3]), "options"),
    "unknown option": (lambda c: c["options"].update(rnk=3), "'rnk'"),
    "rank as text": (lambda c: c["options"].update(rank="three"), CONFIG),
    "rank null": (lambda c: c["options"].update(rank=None), CONFIG),
    "rank fractional": (lambda c: c["options"].update(rank=2.5), CONFIG),
    "rank too small": (lambda c: c["options"].update(rank=0), "rank 0"),
    "rank beyond memory": (lambda c: c["options"].update(rank=10**15), CONFIG),
    "alpha as text": (lambda c: c["options"].update(alpha="five"), CONFIG),
    "dropout as text": (lambda c: c["options"].update(dropout="none"), CONFIG),
    "no modules": (lambda c: {k: v for k, v in c.items() if k != "modules"}, "modules"),
    "modules empty": (lambda c: c.update(modules=[]), "modules"),
    "modules of another type": (lambda c: c.update(modules={"a": 1}), "modules"),
    "a module that is a number": (lambda c: c.update(modules=[7]), CONFIG),
    "a module without rows": (lambda c: c["modules"][0].pop("rows") and None, "rows"),
    "rows a number": (module(rows=8), CONFIG),
    "rows of text": (module(rows=["a", "b"]), CONFIG),
    "rows of one": (module(rows=[0]), CONFIG),
    "rows of three": (module(rows=[0, 8, 2]), CONFIG),
    "rows out of range": (module(rows=[100, 108]), "q"),
    "rows reversed": (module(rows=[8, 0]), "q"),
    "features as text": (module(in_features="eight"), CONFIG),
    "features null": (module(in_features=None), CONFIG),
    "features negative": (module(in_features=-8), "-8"),
    "features zero": (module(in_features=0), CONFIG),
    "features of another size": (module(out_features=9), "q"),
    "unknown module": (module(module="1.attn"), "1.attn"),
    "unknown parameter": (module(parameter="in_weight"), "q"),
    "a module for a parameter": (module(parameter="out_proj"), "q"),
    "a bias for a weight": (module(parameter="in_proj_bias"), "q"),
    "a dot in the slot": (module(name="a.b"), "a.b"),
    "an empty slot": (module(name=""), "0.attn"),
    "another base": (lambda c: c.update(base_model_sha256="0" * 64), "0" * 12),
    "base hash of another type": (lambda c: c.update(base_model_sha256=7), "different base"),
}


@pytest.mark.parametrize("edit", CONFIG_EDITS.values(), ids=list(CONFIG_EDITS))
def test_a_damaged_config_is_refused_and_named(saved, edit):
    _, base, folder = saved
    change, named = edit
    edit_config(folder, change)
    assert_refused(base, folder, named)


KEY = "base_model.model.0.attn.v.lora_A"


def test_a_missing_tensor_is_named(saved):
    _, base, folder = saved
    edit_tensors(folder, lambda tensors: tensors.pop(KEY))
    assert_refused(base, folder, WEIGHTS, "0.attn.v", "lora_A")


@pytest.mark.parametrize("key", ["stranger", "base_model.model.0.attn.x.lora_A", KEY + ".more"])
def test_an_extra_tensor_is_named(saved, key):
    _, base, folder = saved
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(2)}))
    assert_refused(base, folder, WEIGHTS, key.rsplit(".", 2)[-1])


@pytest.mark.parametrize("shape", [(3, 9), (4, 8), (8, 3), (24,), (1, 3, 8), (0, 8)])
def test_a_wrong_shape_is_named(saved, shape):
    _, base, folder = saved
    edit_tensors(folder, lambda tensors: tensors.update({KEY: torch.zeros(shape)}))
    assert_refused(base, folder, WEIGHTS, "0.attn.v", "lora_A")


def test_an_existing_folder_is_refused_and_kept(saved):
    model, _, folder = saved
    before = contents(folder)
    with pytest.raises(VlkrError, match="adapter exists already"):
        save_adapter(model, folder)
    assert contents(folder) == before


def test_force_replaces_the_whole_folder(saved, disturb):
    model, base, folder = saved
    (folder / "old").write_text("from another time")
    disturb(model)
    save_adapter(model, folder, force=True)
    assert set(contents(folder)) == {CONFIG, WEIGHTS, "README.md"}
    load_adapter(base, folder)
    x = torch.randn(2, 5, 8)
    assert torch.equal(base(x), model(x))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_file_is_never_replaced_by_a_folder(saved, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for force in (False, True):
        with pytest.raises(VlkrError, match="is a file"):
            save_adapter(saved[0], path, force=force)
    assert path.read_text() == "mine"


def test_hash_sees_names_types_shapes_values_and_buffers():
    def model(**changes):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        for name, value in changes.items():
            made.get_submodule(name[1]).register_buffer(name[3:], value)
        return made

    plain = model()
    hashes = [
        weights_hash(plain),
        weights_hash(nn.ModuleDict({"a": plain[0], "b": plain[1]})),
        weights_hash(model().double()),
        weights_hash(model().bfloat16()),
        weights_hash(model(_1_running_mean=torch.ones(6))),
        weights_hash(model(_0_extra=torch.tensor(1))),
        weights_hash(model(_0_extra=torch.tensor(2))),
        weights_hash(model(_0_extra=torch.empty(0))),
        weights_hash(model(_0_extra=torch.zeros(2, 3))),
        weights_hash(model(_0_extra=torch.zeros(3, 2))),
        weights_hash(model(_0_extra=torch.zeros(3, 2, dtype=torch.bool))),
    ]
    assert len(set(hashes)) == len(hashes)
    assert weights_hash(model()) == hashes[0]
    transposed = model()
    transposed[0].weight.data = transposed[0].weight.data.T.contiguous().T
    assert weights_hash(transposed) == hashes[0]


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 6))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"2": 3}}])
def test_a_lora_folder_of_peft_gives_the_same_model(tmp_path, options):
    theirs = peft.get_peft_model(
        plain(), peft.LoraConfig(target_modules=["0", "2"], r=3, lora_alpha=5, **options)
    )
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    theirs.save_pretrained(tmp_path)
    ours = plain()
    load_adapter(ours, tmp_path)
    x = torch.randn(4, 9)
    assert_near(ours.eval()(x), theirs.eval()(x))


def test_other_folders_of_peft_are_refused(tmp_path):
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["0"], use_dora=True))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(VlkrError, match="peft's DoRA, expected its plain LoRA"):
        load_adapter(plain(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(VlkrError, match="expected lora_A and lora_B alone"):
        load_adapter(plain(), tmp_path)


def test_the_authors_factors_give_the_authors_forward():
    model = plain()
    state = {
        "0.weight": torch.randn(9, 3),
        "0.v_weight": torch.randn(9, 4),
        "2.weight": torch.randn(6, 2),
        "2.v_weight": torch.randn(6, 6),
    }
    x = torch.randn(4, 9)

    def authors(linear, x, weight, v_weight):
        rows = torch.stack([torch.kron(v, u) for u, v in zip(weight, v_weight, strict=True)])
        delta = rows[:, : max(linear.weight.shape)]
        delta = delta.T if linear.out_features > linear.in_features else delta
        return x @ delta.T * 2.0 + linear(x)

    hidden = authors(model[0], x, state["0.weight"], state["0.v_weight"]).relu()
    expected = authors(model[2], hidden, state["2.weight"], state["2.v_weight"]).detach()
    targets = load_authors_kradapter(model, state)
    assert [t.module for t in targets] == ["0", "2"]
    assert_near(model(x), expected)
    with pytest.raises(VlkrError, match=r"holds no \.v_weight"):
        load_authors_kradapter(plain(), {})
    state["2.v_weight"] = torch.randn(6, 5)
    with pytest.raises(VlkrError, match="factors of 2 are"):
        load_authors_kradapter(plain(), state)
