"""Adapters that other software wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.inject import inject_adapters
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.lora import LoRA
from vlkr.adapters.targets import Target, candidates
from vlkr.errors import VlkrError

_IN_BLOCK = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
}


def transformers_name(key: str) -> str | None:
    """The linear layer of transformers' ``CLIPModel`` for a place in open_clip's ViT CLIP.

    Args:
        key: module and slot.

    >>> transformers_name("visual.transformer.resblocks.3.attn.q")
    'vision_model.encoder.layers.3.self_attn.q_proj'
    """
    match = re.fullmatch(r"(?:(visual)\.|text\.)?transformer\.resblocks\.(\d+)\.(.+)", key)
    if match is None or match[3] not in _IN_BLOCK:
        return None
    tower = "vision_model" if match[1] else "text_model"
    return f"{tower}.encoder.layers.{match[2]}.{_IN_BLOCK[match[3]]}"


def within(folder: Path, name: str) -> Path:
    """A file of a folder.

    Raises:
        VlkrError: if it is a link that leads out of the folder (into the store of the hub's cache
            it may), or no regular file.
    """
    path, real = folder / name, folder.resolve()
    target = path.resolve()
    store = real.parents[1] / "blobs" if len(real.parents) > 1 else real
    if not (target.is_relative_to(real) or target.is_relative_to(store)):
        raise VlkrError(f"{path} is a link that leads out of its folder, to {target}")
    if path.exists() and not path.is_file():
        raise VlkrError(f"cannot read {path}: it is not a file")
    return path


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, which are not read.

    Raises:
        VlkrError: if it cannot be read, or holds something else than floating-point numbers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(key)
                shapes[key] = tuple(part.get_shape())
                if not part.get_dtype().startswith(("F", "BF")):
                    raise VlkrError(
                        f"{path} holds {key} in {part.get_dtype()}, expected floating point"
                    )
    except (OSError, SafetensorError) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error
    return shapes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        VlkrError: if it cannot be read, or holds a number that is not finite.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise VlkrError(f"{path} holds a number that is not finite in {key}")
    return tensors


def peft_lora(
    model: nn.Module, config: Mapping[str, Any], folder: Path
) -> list[tuple[Target, Adapter]]:
    """Reads the factors of a peft LoRA folder for the model's linear layers.

    Args:
        model: whose modules have the names in the folder, or open_clip's model where they are
            those of transformers' ``CLIPModel``.
        config: the folder's ``adapter_config.json``.
        folder: holds ``adapter_model.safetensors``.

    Raises:
        VlkrError: if it is no plain LoRA, or does not fit the model.
    """
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise VlkrError(f"{folder} holds peft's {kind}, expected its plain LoRA")
    weights = within(folder, "adapter_model.safetensors")
    tensor_shapes(weights)
    tensors = read_tensors(weights)
    linears = {t.module: t for t in candidates(model) if t.slot == ("weight", None)}
    for target in candidates(model):
        if twin := transformers_name(f"{target.module}.{target.slot_name}"):
            linears[twin] = target
    made: list[tuple[Target, Adapter]] = []
    for key in tensors:
        name, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if not found:
            if not key.endswith(".lora_B.weight"):
                raise VlkrError(f"{folder} holds {key!r}, expected lora_A and lora_B alone")
            continue
        if name not in linears:
            raise VlkrError(f"{folder} adapts {name}, which is no linear layer of the model")
        a, b = tensors[key], tensors.get(key.replace("lora_A", "lora_B"), torch.empty(0))
        target, rank = linears[name], a.shape[0] if a.dim() else 0
        if a.shape != (rank, target.in_features) or b.shape != (target.out_features, rank):
            raise VlkrError(f"{folder} does not fit {name}: {tuple(a.shape)}, {tuple(b.shape)}")
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise VlkrError(f"{folder} has alpha_pattern {patterns!r}, expected a mapping")
        alpha = patterns.get(name, config.get("lora_alpha"))
        adapter = LoRA(
            target.in_features,
            target.out_features,
            rank=rank,
            alpha=None if alpha is None else _number("lora_alpha", alpha, folder),
            use_rslora=bool(config.get("use_rslora")),
            dropout=_number("lora_dropout", config.get("lora_dropout") or 0.0, folder, below=1),
        )
        adapter.load_state_dict({"lora_A": a.float(), "lora_B": b.float()})
        made.append((target, adapter))
    if not made:
        raise VlkrError(f"{folder / 'adapter_model.safetensors'} holds no LoRA factors")
    return made


def _number(name: str, value: Any, folder: Path, below: float = 1e30) -> float:
    if type(value) not in (int, float) or not abs(value) < below:
        raise VlkrError(f"{folder} has {name} {value!r}, expected a number below {below:g}")
    return float(value)


@torch.no_grad()
def load_authors_kradapter(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    scale: float = 2.0,
    adapter_name: str = "default",
) -> list[Target]:
    """Puts the factors of the KRAdapter authors' layers onto the model's linear layers.

    Their layer calls the zero-started factor ``weight (m, k1)`` and the other
    ``v_weight (m, k2)``.

    Args:
        model: whose linear layers have the names in ``state``.
        state: a state dict with ``<module>.weight`` and ``<module>.v_weight``.
        scale: their ``scale``.
        adapter_name: under which the adapters are kept.

    Raises:
        VlkrError: if there is no ``v_weight``, or a factor does not fit.
    """
    linears = {t.module: t for t in candidates(model) if t.slot == ("weight", None)}
    made: list[tuple[Target, Adapter]] = []
    for key, v in state.items():
        name, found, _ = key.partition(".v_weight")
        if not found:
            continue
        if name not in linears or f"{name}.weight" not in state:
            raise VlkrError(f"{key!r} belongs to no linear layer of the model with a {name}.weight")
        target, u = linears[name], state[f"{name}.weight"]
        adapter = KRAdapter(target.in_features, target.out_features, scale=scale)
        if (u.shape, v.shape) != (adapter.u.shape[1:], adapter.v.shape[1:]):
            raise VlkrError(
                f"the factors of {name} are {tuple(u.shape)} and {tuple(v.shape)}, expected "
                f"{tuple(adapter.u.shape[1:])} and {tuple(adapter.v.shape[1:])}"
            )
        adapter.u.copy_(u)
        adapter.v.copy_(v)
        made.append((target, adapter))
    if not made:
        raise VlkrError("the state dict holds no .v_weight of a KRAdapter layer")
    inject_adapters(model, made, adapter_name)
    return [target for target, _ in made]
