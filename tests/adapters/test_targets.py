from copy import deepcopy

import open_clip
import pytest
import timm
import torch
from helpers import assert_near
from torch import nn
from transformers import CLIPConfig, CLIPModel

from vlkr.adapters import add_adapters, find_targets
from vlkr.adapters.compose import Slot
from vlkr.errors import VlkrError

SPLIT = ("q", "k", "v", "out", "fc1", "fc2")


def paths(*arguments, **keywords):
    return [t.path for t in find_targets(*arguments, **keywords)]


def open_clip_blocks(prefix, count, names=SPLIT):
    inside = {"fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    return {
        f"{prefix}.{i}.{inside.get(name, f'attn.{name}')}" for i in range(count) for name in names
    }


VISUAL, TEXT = "visual.transformer.resblocks", "transformer.resblocks"


@pytest.fixture
def timm_vit():
    return timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=32,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=3,
    )


@pytest.fixture
def transformers_clip():
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "num_hidden_layers": 3,
            "vocab_size": 64,
            "max_position_embeddings": 8,
        },
        vision_config={**tower, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return CLIPModel(config)


def test_defaults_choose_every_projection_of_both_towers(tiny_clip):
    expected = open_clip_blocks(VISUAL, 2) | open_clip_blocks(TEXT, 3)
    found = find_targets(tiny_clip)
    assert {t.path for t in found} == expected
    assert len(found) == 30


@pytest.mark.parametrize("name", [*SPLIT, "qkv"])
def test_short_names_choose_their_projection(name, tiny_clip):
    expected = open_clip_blocks(VISUAL, 2, [name]) | open_clip_blocks(TEXT, 3, [name])
    found = find_targets(tiny_clip, [name])
    assert {t.path for t in found} == expected
    assert {t.name for t in found} == {name}


def test_a_single_name_need_not_be_a_list(tiny_clip):
    assert paths(tiny_clip, "fc1") == paths(tiny_clip, ["fc1"])


def test_slots_of_fused_attention(tiny_clip):
    slots = {t.name: t for t in find_targets(tiny_clip, ["q", "k", "v", "out"], blocks=[0])}
    assert slots["q"].slot == Slot("in_proj_weight", (0, 32))
    assert slots["k"].slot == Slot("in_proj_weight", (32, 64))
    assert slots["v"].slot == Slot("in_proj_weight", (64, 96))
    assert slots["out"].slot == Slot("out_proj.weight")
    (whole,) = find_targets(tiny_clip, ["qkv"], towers=["text"], blocks=[0])
    assert (whole.slot, whole.in_features, whole.out_features) == (
        Slot("in_proj_weight"),
        32,
        96,
    )


def test_sizes_are_those_of_the_weights(tiny_clip):
    for t in find_targets(tiny_clip):
        weight = tiny_clip.get_submodule(t.module).get_parameter(t.slot.parameter)
        assert tuple(t.slot.select(weight).shape) == (t.out_features, t.in_features), t.path


@pytest.mark.parametrize(("tower", "prefix", "count"), [("visual", VISUAL, 2), ("text", TEXT, 3)])
def test_towers(tower, prefix, count, tiny_clip):
    found = find_targets(tiny_clip, towers=[tower])
    assert {t.path for t in found} == open_clip_blocks(prefix, count)
    assert {t.tower for t in found} == {tower}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([0], {("visual", 0), ("text", 0)}),
        ([0, 1], {("visual", 0), ("visual", 1), ("text", 0), ("text", 1)}),
        ([-1], {("visual", 1), ("text", 2)}),
        ([-2, -1], {("visual", 0), ("visual", 1), ("text", 1), ("text", 2)}),
        (range(1, 3), {("visual", 1), ("text", 1), ("text", 2)}),
        ([2], {("text", 2)}),
        ([-3], {("text", 0)}),
        ([0, -1], {("visual", 0), ("visual", 1), ("text", 0), ("text", 2)}),
    ],
)
def test_blocks(blocks, expected, tiny_clip):
    assert {(t.tower, t.block) for t in find_targets(tiny_clip, ["fc1"], blocks=blocks)} == expected


@pytest.mark.parametrize("block", [3, -4, 99])
def test_block_out_of_range_is_named(block, tiny_clip):
    with pytest.raises(VlkrError, match=rf"block {block} .* 3 blocks"):
        find_targets(tiny_clip, blocks=[0, block])


def test_block_range_is_that_of_the_chosen_towers(tiny_clip):
    with pytest.raises(VlkrError, match=r"block 2 .* 2 blocks"):
        find_targets(tiny_clip, towers=["visual"], blocks=[2])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("visual.*.mlp.c_fc", open_clip_blocks(VISUAL, 2, ["fc1"])),
        ("*.mlp.*", open_clip_blocks(VISUAL, 2, SPLIT[4:]) | open_clip_blocks(TEXT, 3, SPLIT[4:])),
        ("visual.*.attn.[qv]", open_clip_blocks(VISUAL, 2, ["q", "v"])),
        ("transformer.resblocks.1.attn.k", {f"{TEXT}.1.attn.k"}),
        ("visual.transformer.resblocks.0.attn.out_proj", {f"{VISUAL}.0.attn.out"}),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", {f"{VISUAL}.0.attn.qkv"}),
    ],
)
def test_patterns(pattern, expected, tiny_clip):
    assert set(paths(tiny_clip, [pattern])) == expected


def test_patterns_and_short_names_add_up_without_doubles(tiny_clip):
    both = paths(tiny_clip, ["fc1", "visual.*.mlp.c_fc", "transformer.*.attn.v"])
    expected = (
        open_clip_blocks(VISUAL, 2, ["fc1"])
        | open_clip_blocks(TEXT, 3, ["fc1"])
        | open_clip_blocks(TEXT, 3, ["v"])
    )
    assert len(both) == len(set(both))
    assert set(both) == expected


def test_a_target_that_matches_nothing_names_its_neighbours(tiny_clip):
    with pytest.raises(VlkrError) as error:
        find_targets(tiny_clip, ["q", "visual.*.mlp.c_fcc"])
    assert "'visual.*.mlp.c_fcc'" in str(error.value)
    assert "visual.transformer.resblocks.0.mlp.c_fc" in str(error.value)


@pytest.mark.parametrize("targets", [["attention"], [""], []])
def test_targets_that_match_nothing_are_refused(targets, tiny_clip):
    with pytest.raises(VlkrError, match="matches nothing"):
        find_targets(tiny_clip, targets)


def test_unknown_tower_is_named(tiny_clip):
    with pytest.raises(VlkrError, match=r"'vision'.*visual, text"):
        find_targets(tiny_clip, towers=["vision"])


@pytest.mark.parametrize(
    "targets",
    [
        ["qkv", "q"],
        ["v", "visual.*.attn.in_proj_weight"],
        ["*.attn.*"],
    ],
)
def test_whole_and_slice_of_one_weight_are_refused(targets, tiny_clip):
    with pytest.raises(VlkrError, match=r"resblocks\.0\.attn .*slice"):
        find_targets(tiny_clip, targets)


def test_whole_in_one_tower_and_slices_in_the_other_are_fine(tiny_clip):
    found = paths(tiny_clip, ["visual.*.attn.qkv", "transformer.*.attn.q"])
    assert len(found) == 2 + 3


def test_timm_vit(timm_vit):
    inside = {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "out": "attn.proj"}
    expected = {
        f"blocks.{i}.{inside.get(name, f'attn.qkv.{name}')}" for i in range(3) for name in SPLIT
    }
    found = find_targets(timm_vit)
    assert {t.path for t in found} == expected
    assert {t.tower for t in found} == {None}
    assert {t.slot.rows for t in found if t.name == "k"} == {(32, 64)}
    assert paths(timm_vit, ["qkv"], blocks=[-1]) == ["blocks.2.attn.qkv"]
    assert paths(timm_vit, ["head"]) == ["head"]
    with pytest.raises(VlkrError, match=r"blocks\.0\.attn\.qkv .*slice"):
        find_targets(timm_vit, ["qkv", "q"])


def test_transformers_clip(transformers_clip):
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    expected = {
        f"{tower}.encoder.layers.{i}.{name}"
        for tower, count in (("vision_model", 2), ("text_model", 3))
        for i in range(count)
        for name in (*names, "mlp.fc1", "mlp.fc2")
    }
    assert set(paths(transformers_clip)) == expected
    assert {t.tower for t in find_targets(transformers_clip)} == {"visual", "text"}
    assert paths(transformers_clip, ["fc2"], towers=["visual"], blocks=[-1]) == [
        "vision_model.encoder.layers.1.mlp.fc2"
    ]
    assert paths(transformers_clip, ["*_projection"]) == ["visual_projection", "text_projection"]
    with pytest.raises(VlkrError, match="'qkv' matches nothing"):
        find_targets(transformers_clip, ["qkv"])


def test_plain_modules_by_pattern():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 2)))
    assert paths(model, ["*"]) == ["0", "2.0"]
    assert paths(model, ["2.*"]) == ["2.0"]
    with pytest.raises(VlkrError, match="matches nothing"):
        find_targets(model)


def test_a_model_without_weights_says_so():
    with pytest.raises(VlkrError, match="no linear or attention weights"):
        find_targets(nn.Sequential(nn.ReLU()), ["*"])


def test_default_towers_leave_out_a_decoder():
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4)) for name in ("text_decoder", "x")})
    assert paths(model, ["*"]) == ["x.0"]
    assert paths(model, ["*"], towers=["decoder"]) == ["text_decoder.0", "x.0"]


def test_a_bare_linear_is_a_target():
    model = nn.Linear(4, 6)
    x = torch.randn(2, 4)
    expected = model(x)
    add_adapters(model, "kradapter", targets=["*"])
    assert_near(model(x), expected)


@pytest.mark.parametrize(
    ("targets", "names"),
    [(["q", "k"], ["q", "k"]), (["out_proj"], ["out"]), (["in_proj_weight"], ["qkv"])],
)
def test_a_bare_attention_has_targets(targets, names):
    model = nn.MultiheadAttention(8, 2)
    assert [t.name for t in add_adapters(model, "kradapter", targets=targets)] == names


@pytest.mark.parametrize("name", ["default", "values", "keys", "items", "update"])
def test_any_module_name_can_be_a_target(name):
    model = nn.Sequential(nn.Module())
    model[0].add_module(name, nn.Linear(4, 4))
    found = add_adapters(model, "kradapter", targets=[f"0.{name}"])
    assert [t.module for t in found] == [f"0.{name}"]


def test_a_tower_that_short_names_do_not_reach_is_told():
    with torch.device("meta"):
        resnet = open_clip.create_model("RN50", load_weights=False, device="meta")
    with pytest.warns(UserWarning, match="the visual tower has nothing to adapt"):
        found = add_adapters(deepcopy(resnet), "lora")
    assert {target.tower for target in found} == {"text"}
    add_adapters(deepcopy(resnet), "lora", targets=["visual.attnpool.*_proj"])
    add_adapters(deepcopy(resnet), "lora", blocks=[0])
    add_adapters(resnet, "lora", towers=["text"])
