"""Adapters that other software wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.inject import attach
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.lora import LoRA
from vlkr.adapters.targets import Target, candidates
from vlkr.errors import VlkrError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        VlkrError: if it cannot be read.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error
    return tensors


def peft_lora(
    model: nn.Module, config: Mapping[str, Any], folder: Path
) -> list[tuple[Target, Adapter]]:
    """Reads the factors of a peft LoRA folder for the model's linear layers.

    Args:
        model: whose modules have the names in the folder.
        config: the folder's ``adapter_config.json``.
        folder: holds ``adapter_model.safetensors``.

    Raises:
        VlkrError: if it is no plain LoRA, or does not fit the model.
    """
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise VlkrError(f"{folder} holds peft's {kind}, expected its plain LoRA")
    tensors = read_tensors(folder / "adapter_model.safetensors")
    linears = {t.module: t for t in candidates(model) if t.slot == ("weight", None)}
    made: list[tuple[Target, Adapter]] = []
    for key in tensors:
        name, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if not found:
            if not key.endswith(".lora_B.weight"):
                raise VlkrError(f"{folder} holds {key!r}, expected lora_A and lora_B alone")
            continue
        if name not in linears:
            raise VlkrError(f"{folder} adapts {name}, which is no linear layer of the model")
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        target, rank = linears[name], a.shape[0]
        if a.shape[1] != target.in_features or b.shape != (target.out_features, rank):
            raise VlkrError(f"{folder} does not fit {name}: {tuple(a.shape)}, {tuple(b.shape)}")
        alpha = (config.get("alpha_pattern") or {}).get(name, config.get("lora_alpha"))
        adapter = LoRA(
            target.in_features,
            target.out_features,
            rank=rank,
            alpha=None if alpha is None else float(alpha),
            use_rslora=bool(config.get("use_rslora")),
            dropout=float(config.get("lora_dropout") or 0.0),
        )
        adapter.load_state_dict({"lora_A": a.float(), "lora_B": b.float()})
        made.append((target, adapter))
    if not made:
        raise VlkrError(f"{folder / 'adapter_model.safetensors'} holds no LoRA factors")
    return made


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
    attach(model, made, adapter_name)
    return [target for target, _ in made]
