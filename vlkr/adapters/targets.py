"""Finds the weights of a model that can carry an adapter, by the names that a user gives.

Only parameter names count, so that the transformers of all libraries are treated alike: a fused
``in_proj_weight`` or ``qkv`` is offered as row slices q, k and v and as a whole, split
projections as they are.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from vlkr.adapters.compose import Slot, base_parameter
from vlkr.errors import VlkrError

SHORT_NAMES = ("q", "k", "v", "qkv", "out", "fc1", "fc2")
DEFAULT_TARGETS = ("q", "k", "v", "out", "fc1", "fc2")
TOWERS = ("visual", "text", "decoder")

_LINEAR_NAMES = {
    "q_proj": "q",
    "query": "q",
    "k_proj": "k",
    "key": "k",
    "v_proj": "v",
    "value": "v",
    "o_proj": "out",
    "out_proj": "out",
    "attn.proj": "out",
    "c_fc": "fc1",
    "fc1": "fc1",
    "fc1_g": "fc1",
    "fc1_x": "fc1",
    "gate_proj": "fc1",
    "up_proj": "fc1",
    "c_proj": "fc2",
    "fc2": "fc2",
    "down_proj": "fc2",
}
#: layers of transformers' CLIPModel, by the slots of open_clip's ViT CLIP
_TRANSFORMERS_NAMES = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
}
_TOWER_PREFIXES = {
    "visual": "visual",
    "vision_model": "visual",
    "text": "text",
    "text_model": "text",
    "transformer": "text",
    "text_decoder": "decoder",
}


@dataclass(frozen=True)
class Target:
    """A weight, or some rows of it, that can carry an adapter.

    Attributes:
        module: qualified name of the module that hosts the adapter.
        slot: the parameter in that module, and its rows.
        name: short name (``"q"``) or, where there is none, the module's own last name.
        in_features: columns.
        out_features: rows of the slice.
    """

    module: str
    slot: Slot
    name: str
    in_features: int
    out_features: int

    @property
    def path(self) -> str:
        """Name that patterns are matched against: ``...attn.q``, ``...mlp.c_fc``."""
        own_name = self.slot.parameter == "weight" and self.slot.rows is None
        return self.module if own_name else f"{self.module}.{self.name}".lstrip(".")

    @property
    def slot_name(self) -> str:
        """Name of the adapter in its host: that of the slice, or of the parameter."""
        whole = self.slot.parameter in ("weight", "bias") and self.slot.rows is None
        return self.slot.parameter if whole else self.name

    @property
    def tower(self) -> str | None:
        """``"visual"``, ``"text"`` or ``"decoder"``; None for a model without towers."""
        return _TOWER_PREFIXES.get(self.module.split(".", 1)[0])

    @property
    def block(self) -> int | None:
        """Index of the transformer block: the first number in the module's name."""
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.module)
        return int(match[1]) if match else None


def candidates(model: nn.Module) -> Iterator[Target]:
    """Yields every weight of ``model`` that can carry an adapter."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        for name, slot in _attention_slots(module):
            out_features, in_features = slot.select(base_parameter(module, slot.parameter)).shape
            yield Target(path, slot, name, in_features, out_features)
            inside.add(module.get_submodule(slot.parameter.rpartition(".")[0]))
        if isinstance(module, nn.Linear):
            out_features, in_features = module.weight.shape
            tail = path.rsplit(".", 2)[-2:]
            name = _LINEAR_NAMES.get(".".join(tail)) or _LINEAR_NAMES.get(tail[-1], tail[-1])
            if name == "qkv":
                yield from (
                    Target(path, Slot("weight", rows), part, in_features, out_features // 3)
                    for part, rows in _thirds(out_features)
                )
            yield Target(path, Slot("weight"), name, in_features, out_features)


def _attention_slots(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yields weights that an attention module uses without calling a linear layer's forward."""
    own, qkv, out = module._parameters, _linear(module, "qkv"), _linear(module, "out_proj")
    fused, split = own.get("in_proj_weight"), own.get("q_proj_weight")
    if fused is not None:
        yield from _fused_slots("in_proj_weight", fused.shape[0])
    elif split is not None:
        yield from ((name, Slot(f"{name}_proj_weight")) for name in "qkv")
    elif qkv is not None and own.get("q_bias") is not None:  # timm's BEiT and EVA
        yield from _fused_slots("qkv.weight", qkv.out_features)
    if out is not None and (fused is not None or split is not None):
        yield "out", Slot("out_proj.weight")


def _fused_slots(parameter: str, rows: int) -> Iterator[tuple[str, Slot]]:
    yield from ((name, Slot(parameter, part)) for name, part in _thirds(rows))
    yield "qkv", Slot(parameter)


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    child = module._modules.get(name)
    return child if isinstance(child, nn.Linear) else None


def _thirds(rows: int) -> Iterator[tuple[str, tuple[int, int]]]:
    third = rows // 3
    return ((name, (i * third, (i + 1) * third)) for i, name in enumerate("qkv"))


def find_targets(
    model: nn.Module,
    targets: Sequence[str] = DEFAULT_TARGETS,
    towers: Sequence[str] = ("visual", "text"),
    blocks: Sequence[int] | None = None,
) -> list[Target]:
    """Returns the weights that short names or patterns, towers and blocks choose.

    Args:
        model: any module.
        targets: short names (``q k v qkv out fc1 fc2``) and shell patterns of module names.
        towers: ``"visual"``, ``"text"``; a model without towers matches always.
        blocks: indices of transformer blocks, negative ones from a tower's end; None for all.

    Raises:
        VlkrError: if a target or block matches nothing, or two choices overlap.
    """
    if isinstance(targets, str):
        targets = (targets,)
    for tower in towers:
        if tower not in TOWERS:
            raise VlkrError(f"unknown tower {tower!r}, expected one of {', '.join(TOWERS)}")
    everything = list(candidates(model))
    within = [t for t in everything if t.tower is None or t.tower in towers]
    if blocks is not None:
        within = _in_blocks(within, blocks)
    has_blocks = any(t.block is not None and t.name in SHORT_NAMES for t in everything)
    chosen: dict[Target, None] = {}
    for pattern in targets:
        matched = [t for t in within if _matches(t, pattern, in_block=has_blocks)]
        if not matched and not (tuple(targets) == DEFAULT_TARGETS and pattern in SHORT_NAMES):
            raise VlkrError(_nothing_matched(pattern, within, everything))
        chosen.update(dict.fromkeys(matched))
    if not chosen:
        raise VlkrError(_nothing_matched(" ".join(targets), within, everything))
    _check_overlap(list(chosen))
    return [t for t in within if t in chosen]


def warn_of_untouched(
    model: nn.Module, matched: Sequence[Target], targets: Sequence[str], towers: Sequence[str]
) -> None:
    """Warns of a tower, such as a ResNet, in which short names match nothing.

    Args:
        model: any module.
        matched: result of :func:`find_targets`.
        targets: as given there; patterns raise no warning.
        towers: as given there.
    """
    names = {targets} if isinstance(targets, str) else set(targets)
    if not names <= set(SHORT_NAMES):
        return
    untouched = {t.tower for t in candidates(model)} - {t.tower for t in matched}
    for tower in untouched.intersection(towers):
        warnings.warn(
            f"the {tower} tower has nothing to adapt under these names and stays as it is; "
            "targets may also be patterns of module names",
            stacklevel=3,
        )


def bias_targets(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """Returns the biases that belong to weights; a missing one raises :class:`VlkrError`."""
    modules = dict(model.named_modules())
    biases: list[Target] = []
    for target in targets:
        bias = target.slot.parameter.removesuffix("weight") + "bias"
        owner, _, name = bias.rpartition(".")
        if modules[target.module].get_submodule(owner)._parameters.get(name) is None:
            raise VlkrError(f"{target.path} has no bias to adapt; choose other targets")
        slot = target.slot._replace(parameter=bias)
        biases.append(replace(target, slot=slot, name=f"{target.name}_bias"))
    return biases


def _matches(target: Target, pattern: str, *, in_block: bool) -> bool:
    if pattern in SHORT_NAMES:
        return target.name == pattern and (target.block is not None or not in_block)
    names = [target.path]
    if target.slot.rows is None:
        names.append(f"{target.module}.{target.slot.parameter}".lstrip("."))
        names.append(names[-1].removesuffix(".weight"))
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _in_blocks(targets: list[Target], blocks: Sequence[int]) -> list[Target]:
    counts: dict[str | None, int] = {}
    for t in targets:
        if t.block is not None:
            counts[t.tower] = max(counts.get(t.tower, 0), t.block + 1)
    for block in blocks:
        if not any(-count <= block < count for count in counts.values()):
            size = max(counts.values(), default=0)
            raise VlkrError(f"block {block} is out of range, the model has {size} blocks")
    return [
        t
        for t in targets
        if t.block is not None and (t.block in blocks or t.block - counts[t.tower] in blocks)
    ]


def _nothing_matched(pattern: str, within: list[Target], everything: list[Target]) -> str:
    if not everything:
        return f"target {pattern!r} matches nothing: the model has no linear or attention weights"
    names = list(dict.fromkeys(t.path for t in (within or everything)))
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return (
        f"target {pattern!r} matches nothing; short names: {' '.join(SHORT_NAMES)}; "
        f"nearest module names: {', '.join(near)}"
    )


def _check_overlap(targets: list[Target]) -> None:
    whole = {(t.module, t.slot.parameter) for t in targets if t.slot.rows is None}
    for t in targets:
        if t.slot.rows is not None and (t.module, t.slot.parameter) in whole:
            raise VlkrError(
                f"{t.module} would be adapted both as a whole and as its slice {t.name!r}; "
                "choose either qkv or q, k, v"
            )


def transformers_name(key: str) -> str | None:
    """Returns the linear layer of transformers' ``CLIPModel`` for a slot of open_clip's ViT CLIP.

    Args:
        key: module and slot, as :attr:`InjectedAdapter.key`.

    >>> transformers_name("visual.transformer.resblocks.3.attn.q")
    'vision_model.encoder.layers.3.self_attn.q_proj'
    """
    match = re.fullmatch(r"(?:(visual)\.|text\.)?transformer\.resblocks\.(\d+)\.(.+)", key)
    if match is None or match[3] not in _TRANSFORMERS_NAMES:
        return None
    tower = "vision_model" if match[1] else "text_model"
    return f"{tower}.encoder.layers.{match[2]}.{_TRANSFORMERS_NAMES[match[3]]}"
