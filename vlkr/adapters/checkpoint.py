"""Adapters on disk, in peft's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.foreign import peft_lora, read_tensors
from vlkr.adapters.inject import attach, hosts, placed_adapters, set_adapter_scale
from vlkr.adapters.linear import Slot
from vlkr.adapters.registry import adapter_class, check_options, registered_name
from vlkr.adapters.targets import Target
from vlkr.errors import VlkrError
from vlkr.files import atomic_folder, read_json, write_json, write_text
from vlkr.hashing import weights_hash
from vlkr.version import __version__

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str = "",
    adapter_name: str = "default",
    force: bool = False,
) -> None:
    """Writes the adapters and what is needed to put them back, as one folder, in one step.

    Args:
        model: with adapters.
        folder: to write; refused when it holds something, unless ``force``.
        base_model: name of the base model, for the reader.
        adapter_name: which adapters.
        force: replace what is there.

    Raises:
        VlkrError: if there are no such adapters, or the folder cannot be written.
    """
    placed = placed_adapters(model, adapter_name)
    if any(host.is_merged for _, host in hosts(model)):
        raise VlkrError("the adapters are merged for now; save them outside of merged(model)")
    method = registered_name(placed[0].adapter)
    options = placed[0].adapter.options()
    scales = (h.adapter_scales[adapter_name] for _, h in hosts(model) if adapter_name in h.adapters)
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
        "scale": next(scales),
        "modules": modules,
        "vlkr_version": __version__,
    }
    tensors = {
        f"{_PREFIX}{p.key}.{factor}": tensor.detach().cpu().contiguous()
        for p in placed
        for factor, tensor in p.adapter.state_dict().items()
    }
    with atomic_folder(Path(folder), force=force) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise VlkrError(f"cannot write {folder}: {error}") from error
        write_json(temporary / _CONFIG, config)
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
    config = read_json(folder / _CONFIG)
    if "modules" not in config and "target_modules" in config:
        attach(model, peft_lora(model, config, folder), adapter_name)
        return
    made = _read_adapters(config, folder / _CONFIG)
    _check_fit(model, made, config, folder)
    if check_base and (found := weights_hash(model)) != config.get("base_model_sha256"):
        raise VlkrError(
            f"{folder} was made for another base: {config.get('base_model_name_or_path')!r} with "
            f"weights {str(config.get('base_model_sha256'))[:12]}, the model has {found[:12]}"
        )
    tensors = read_tensors(folder / _WEIGHTS)
    expected: set[str] = set()
    for target, adapter in made:
        prefix = _PREFIX + f"{target.module}.{target.slot_name}.".lstrip(".")
        state = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        expected.update(prefix + key for key in adapter.state_dict())
        try:
            adapter.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise VlkrError(f"{folder / _WEIGHTS} does not hold {prefix[:-1]}: {reason}") from error
    if unknown := set(tensors) - expected:
        raise VlkrError(f"{folder / _WEIGHTS} holds an unexpected tensor {sorted(unknown)[0]!r}")
    attach(model, made, adapter_name)
    set_adapter_scale(model, float(config.get("scale", 1.0)), adapter_name)


def _read_adapters(config: dict[str, Any], path: Path) -> list[tuple[Target, Adapter]]:
    method = str(config.get("peft_type")).lower()
    cls = adapter_class(method)
    options, modules = config.get("options"), config.get("modules")
    if not isinstance(options, dict) or not isinstance(modules, list) or not modules:
        raise VlkrError(f"{path} lacks its options or modules; it was not written by vlkr")
    try:
        check_options(method, options)
        targets = [_read_target(m) for m in modules]
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
            weight = modules[target.module].get_parameter(target.slot.parameter)
        except (KeyError, AttributeError):
            weight = None
        if weight is None or tuple(target.slot.select(weight).shape) != adapter.shape:
            raise VlkrError(
                f"{folder} does not fit the model: no {target.path} of shape {adapter.shape}; it "
                f"was made for {config.get('base_model_name_or_path') or 'another model'!r}"
            )
