"""Adapters on disk, in peft's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.compose import Slot, base_parameter
from vlkr.adapters.foreign import peft_lora, read_tensors, tensor_shapes, within
from vlkr.adapters.hosts import adapter_layers, weights_hash
from vlkr.adapters.inject import inject_adapters, injected_adapters, set_adapter_scale
from vlkr.adapters.registry import adapter_class, check_options, registered_name
from vlkr.adapters.targets import Target
from vlkr.errors import VlkrError
from vlkr.files import atomic_folder, json_sha256, read_json, sha256_of, write_json, write_text
from vlkr.version import __version__

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAX_BASIS = 2**28
"""Elements of a method's random matrices, which are made again and not read (1 GiB)."""


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str = "",
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Writes the adapters and what is needed to put them back, as one folder, in one step.

    Args:
        model: with adapters.
        folder: to write; refused when it holds something, unless ``force``.
        base_model: name of the base model, for the reader.
        adapter_name: which adapters.
        dtype: of the tensors, None for their own.
        force: replace what is there.

    Raises:
        VlkrError: if there are no such adapters, or the folder cannot be written.
    """
    placed = injected_adapters(model, adapter_name)
    if any(host.is_merged for _, host in adapter_layers(model)):
        raise VlkrError("the adapters are merged for now; save them outside of merged(model)")
    method = registered_name(placed[0].adapter)
    options = placed[0].adapter.options()
    modules = [
        {
            "module": p.module,
            "name": p.name,
            "parameter": p.slot.parameter,
            "rows": p.slot.rows,
            "in_features": p.adapter.in_features,
            "out_features": p.adapter.out_features,
        }
        for p in placed
    ]
    config = {
        "peft_type": method.upper(),
        "base_model_name_or_path": base_model,
        "base_model_sha256": weights_hash(model),
        "options": options,
        "scale": placed[0].scale,
        "modules": modules,
        "vlkr_version": __version__,
    }
    tensors = {
        f"{_PREFIX}{p.key}.{factor}": tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        for p in placed
        for factor, tensor in p.adapter.state_dict().items()
    }
    with atomic_folder(Path(folder), force=force) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise VlkrError(f"cannot write {folder}: {error}") from error
        config["model_sha256"] = sha256_of(temporary / _WEIGHTS)
        write_json(temporary / _CONFIG, {**config, "config_sha256": json_sha256(config)})
        write_text(temporary / "README.md", _card(config, sum(t.numel() for t in tensors.values())))


def _card(config: dict[str, Any], parameters: int) -> str:
    return (
        f"# {config['peft_type']} adapter of {config['base_model_name_or_path'] or 'a model'}\n\n"
        f"{len(config['modules'])} weights adapted with {parameters:,} parameters; options "
        f"{config['options']}.\nBase weights: SHA-256 `{config['base_model_sha256']}`.\n\n"
        "```python\nimport vlkr\n\nvlkr.load_adapter(model, FOLDER)\n```\n"
    )


def load_adapter(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default", check_base: bool = True
) -> None:
    """Puts saved adapters onto the model they were made for.

    Args:
        model: the base model, or one with adapters of other names.
        folder: written by :func:`save_adapter`, or a LoRA of linear layers written by peft,
            which has no hash of its base to check.
        adapter_name: under which they are kept in the model.
        check_base: refuse a model whose weights are not those the adapters were trained on.

    Raises:
        VlkrError: if the folder is not a whole adapter, or does not fit the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VlkrError(f"no adapter folder at {folder}")
    config = read_json(within(folder, _CONFIG))
    if "modules" not in config and "target_modules" in config:
        inject_adapters(model, peft_lora(model, config, folder), adapter_name)
        return
    _check_hashes(config, folder)
    scale = config.get("scale", 1.0)
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise VlkrError(f"{folder / _CONFIG} has scale {scale!r}, expected a number")
    shapes = tensor_shapes(within(folder, _WEIGHTS))
    with torch.device("meta"):  # nothing is made of what does not fit
        planned = _read_adapters(config, folder / _CONFIG, shapes)
    _check_fit(model, planned, config, folder)
    _check_shapes(planned, shapes, folder / _WEIGHTS)
    if check_base and (found := weights_hash(model)) != config.get("base_model_sha256"):
        raise VlkrError(
            f"{folder} was made for another base: {config.get('base_model_name_or_path')!r} with "
            f"weights {str(config.get('base_model_sha256'))[:12]}, the model has {found[:12]}"
        )
    made = _read_adapters(config, folder / _CONFIG, shapes)
    tensors = read_tensors(folder / _WEIGHTS)
    for target, adapter in made:
        prefix = _prefix(target)
        adapter.load_state_dict({key: tensors[prefix + key] for key in adapter.state_dict()})
    inject_adapters(model, made, adapter_name)
    set_adapter_scale(model, float(scale), adapter_name)


def _check_hashes(config: dict[str, Any], folder: Path) -> None:
    """Names the file that is not as it was written."""
    own = {key: value for key, value in config.items() if key != "config_sha256"}
    if config.get("config_sha256") != json_sha256(own):
        raise VlkrError(
            f"{folder / _CONFIG} is damaged or was changed: its config_sha256 is not that of its "
            "other entries"
        )
    try:
        found = sha256_of(within(folder, _WEIGHTS))
    except OSError as error:
        raise VlkrError(f"cannot read {folder / _WEIGHTS}: {error.strerror}") from error
    if found != config.get("model_sha256"):
        raise VlkrError(
            f"{folder / _WEIGHTS} is damaged or was changed: its SHA-256 is {found[:12]}..., "
            f"expected {str(config.get('model_sha256'))[:12]}..."
        )


def _prefix(target: Target) -> str:
    return _PREFIX + f"{target.module}.{target.slot_name}.".lstrip(".")


def _check_shapes(
    planned: list[tuple[Target, Adapter]], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    basis = sum(buffer.numel() for _, adapter in planned for buffer in adapter.buffers())
    if basis > _MAX_BASIS:
        options = planned[0][1].options()
        raise VlkrError(f"{path.parent} asks for random matrices of {basis:,} numbers: {options}")
    expected = {
        _prefix(target) + key: tuple(tensor.shape)
        for target, adapter in planned
        for key, tensor in adapter.state_dict().items()
    }
    for key, shape in expected.items():
        if shapes.get(key) != shape:
            found = f"in shape {shapes[key]}" if key in shapes else "at all"
            raise VlkrError(f"{path} does not hold {key} of shape {shape}, or not {found}")
    if unknown := sorted(set(shapes) - set(expected)):
        raise VlkrError(f"{path} holds an unexpected tensor {unknown[0]!r}")


def _read_adapters(
    config: dict[str, Any], path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[Target, Adapter]]:
    method = str(config.get("peft_type")).lower()
    cls = adapter_class(method)
    options, modules = config.get("options"), config.get("modules")
    if not isinstance(options, dict) or not isinstance(modules, list) or not modules:
        raise VlkrError(f"{path} lacks its options or modules; it was not written by vlkr")
    try:
        check_options(method, options)
        size = options.get(cls.budget_option) if cls.budget_option else None
        if size is not None and size > (most := max(map(max, filter(None, shapes.values())))):
            raise ValueError(f"{cls.budget_option} {size} of tensors whose sides are up to {most}")
        targets = [_read_target(m) for m in modules]
        times = Counter((t.module, t.slot_name) for t in targets)
        if twice := [".".join(place) for place, number in times.items() if number > 1]:
            raise ValueError(f"{twice[0]} comes twice")
        return [(t, cls(t.in_features, t.out_features, **options)) for t in targets]
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        kind = "" if isinstance(error, VlkrError) else f"{type(error).__name__} "
        raise VlkrError(f"{path} is damaged: {kind}{' '.join(str(error).split())}") from error


def _read_target(entry: Mapping[str, Any]) -> Target:
    in_features, out_features = entry["in_features"], entry["out_features"]
    if not all(type(size) is int and 0 < size < 2**31 for size in (in_features, out_features)):
        raise ValueError(f"sizes {in_features}, {out_features} are no positive numbers")
    rows = None
    if entry["rows"] is not None:
        first, past = map(int, entry["rows"])
        rows = (first, past)
    slot = Slot(str(entry["parameter"]), rows)
    return Target(str(entry["module"]), slot, str(entry["name"]), in_features, out_features)


def _check_fit(
    model: nn.Module, made: list[tuple[Target, Adapter]], config: dict[str, Any], folder: Path
) -> None:
    modules = dict(model.named_modules())
    for target, adapter in made:
        try:
            weight = base_parameter(modules[target.module], target.slot.parameter)
        except (KeyError, AttributeError):
            weight = None
        if weight is None or tuple(target.slot.select(weight).shape) != adapter.shape:
            raise VlkrError(
                f"{folder} does not fit the model: no {target.path} of shape {adapter.shape}; it "
                f"was made for {config.get('base_model_name_or_path') or 'another model'!r}"
            )
