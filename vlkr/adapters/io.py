"""Adapter folders in peft's layout, and adapters that other software wrote.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Both are untrusted: what
is read is an adapter that fits the model, or a :class:`VlkrError`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlkr.adapters.base import Adapter
from vlkr.adapters.compose import Slot, base_parameter
from vlkr.adapters.hosts import adapter_layers, weights_hash
from vlkr.adapters.inject import inject_adapters, injected_adapters, set_adapter_scale
from vlkr.adapters.kradapter import KRAdapter
from vlkr.adapters.lora import LoRA
from vlkr.adapters.registry import adapter_class, check_options, registered_name
from vlkr.adapters.targets import Target, candidates, transformers_name
from vlkr.errors import VlkrError
from vlkr.files import atomic_folder, json_sha256, read_json, sha256_of, write_json, write_text
from vlkr.version import __version__

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: largest number of elements of random matrices, which are made, not read (1 GiB).
_MAX_BASIS = 2**28


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str = "",
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Saves adapters as a folder, which is written atomically.

    Args:
        model: with adapters.
        folder: folder to write; one that is not empty is refused, unless ``force``.
        base_model: name of the base model, for the reader.
        adapter_name: name of the adapters to save.
        dtype: dtype of the tensors, by default their own.
        force: replace a folder that is not empty.

    Raises:
        VlkrError: if the model has no such adapters, or the folder cannot be written.
    """
    injected = injected_adapters(model, adapter_name)
    if any(host.is_merged for _, host in adapter_layers(model)):
        raise VlkrError("cannot save merged adapters; call save_adapter outside merged(model)")
    first = injected[0]
    modules = [
        {
            "module": p.module,
            "name": p.name,
            "parameter": p.slot.parameter,
            "rows": p.slot.rows,
            "in_features": p.adapter.in_features,
            "out_features": p.adapter.out_features,
        }
        for p in injected
    ]
    config = {
        "peft_type": registered_name(first.adapter).upper(),
        "base_model_name_or_path": base_model,
        "base_model_sha256": weights_hash(model),
        "options": first.adapter.options(),
        "scale": first.scale,
        "modules": modules,
        "vlkr_version": __version__,
    }
    tensors = {
        f"{_PREFIX}{p.key}.{factor}": tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        for p in injected
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
    """Loads saved adapters into the model they were made for.

    Args:
        model: the base model, or one with adapters of different names.
        folder: written by :func:`save_adapter`, or a LoRA of linear layers written by peft,
            which has no hash of its base to check.
        adapter_name: name of the adapters in the model.
        check_base: refuse a model whose weights are not those the adapters were trained on.

    Raises:
        VlkrError: if the folder is not a complete adapter, or does not fit the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VlkrError(f"no adapter folder at {folder}")
    config = read_json(_within(folder, _CONFIG))
    if "modules" not in config and "target_modules" in config:
        inject_adapters(model, _peft_lora(model, config, folder), adapter_name)
        return
    _check_hashes(config, folder)
    scale = config.get("scale", 1.0)
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise VlkrError(f"{folder / _CONFIG} has scale {scale!r}, expected a number")
    shapes = _tensor_shapes(_within(folder, _WEIGHTS))
    with torch.device("meta"):  # nothing is allocated for what does not fit
        planned = _read_adapters(config, folder / _CONFIG, shapes)
    _check_fit(model, planned, config, folder)
    _check_shapes(planned, shapes, folder / _WEIGHTS)
    if check_base and (own_hash := weights_hash(model)) != config.get("base_model_sha256"):
        raise VlkrError(
            f"{folder} was made for a different base: {config.get('base_model_name_or_path')!r} "
            f"with weights {str(config.get('base_model_sha256'))[:12]}, the model has "
            f"{own_hash[:12]}"
        )
    adapters = _read_adapters(config, folder / _CONFIG, shapes)
    tensors = _read_tensors(folder / _WEIGHTS)
    for target, adapter in adapters:
        prefix = _prefix(target)
        adapter.load_state_dict({key: tensors[prefix + key] for key in adapter.state_dict()})
    inject_adapters(model, adapters, adapter_name)
    set_adapter_scale(model, float(scale), adapter_name)


def _check_hashes(config: dict[str, Any], folder: Path) -> None:
    """Raises for the file that is not as it was written."""
    own = {key: value for key, value in config.items() if key != "config_sha256"}
    if config.get("config_sha256") != json_sha256(own):
        raise VlkrError(
            f"{folder / _CONFIG} is damaged or was changed: its config_sha256 is not that of its "
            "other entries"
        )
    try:
        actual = sha256_of(_within(folder, _WEIGHTS))
    except OSError as error:
        raise VlkrError(f"cannot read {folder / _WEIGHTS}: {error.strerror}") from error
    if actual != config.get("model_sha256"):
        raise VlkrError(
            f"{folder / _WEIGHTS} is damaged or was changed: its SHA-256 is {actual[:12]}..., "
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
            actual = f"in shape {shapes[key]}" if key in shapes else "nowhere"
            raise VlkrError(f"{path} must hold {key} in shape {shape}, it is there {actual}")
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
        raise ValueError(f"sizes {in_features}, {out_features} are not 1 to 2**31 - 1")
    module, name, parameter, rows = (entry[k] for k in ("module", "name", "parameter", "rows"))
    if not all(type(text) is str for text in (module, name, parameter)):
        raise ValueError(f"module, name and parameter {module, name, parameter} are not all text")
    if rows is not None:
        first, past = rows
        if type(first) is not int or type(past) is not int:
            raise ValueError(f"rows {rows} are not two integers")
        rows = (first, past)
    target = Target(module, Slot(parameter, rows), name, in_features, out_features)
    if target.slot_name != name:
        raise ValueError(f"name {name!r} is not {target.slot_name!r}")
    return target


def _check_fit(
    model: nn.Module, planned: list[tuple[Target, Adapter]], config: dict[str, Any], folder: Path
) -> None:
    modules = dict(model.named_modules())
    for target, adapter in planned:
        try:
            weight = base_parameter(modules[target.module], target.slot.parameter)
        except (KeyError, AttributeError):
            weight = None
        if weight is None or tuple(target.slot.select(weight).shape) != adapter.shape:
            raise VlkrError(
                f"{folder} does not fit the model: no {target.path} of shape {adapter.shape}; it "
                f"was made for {config.get('base_model_name_or_path') or 'another model'!r}"
            )


def _within(folder: Path, name: str) -> Path:
    """Returns a file of a folder, not a link out of it except into the store of the hub's cache."""
    path, real = folder / name, folder.resolve()
    target = path.resolve()
    store = real.parents[1] / "blobs" if len(real.parents) > 1 else real
    if not (target.is_relative_to(real) or target.is_relative_to(store)):
        raise VlkrError(f"{path} is a link that leads out of its folder, to {target}")
    if path.exists() and not path.is_file():
        raise VlkrError(f"cannot read {path}: it is not a file")
    return path


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of floating-point tensors in a file, without reading their data."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is not a mapping)
                part = file.get_slice(key)
                shapes[key] = tuple(part.get_shape())
                if not part.get_dtype().startswith(("F", "BF")):
                    raise VlkrError(
                        f"{path} holds {key} in {part.get_dtype()}, expected floating point"
                    )
    except (OSError, SafetensorError) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error
    return shapes


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file, which must be finite."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise VlkrError(f"{path} holds a number that is not finite in {key}")
    return tensors


def _peft_lora(
    model: nn.Module, config: Mapping[str, Any], folder: Path
) -> list[tuple[Target, Adapter]]:
    """Reads the factors of a plain LoRA of peft for the model's linear layers.

    An open_clip model may also have them by the names of transformers' ``CLIPModel``.
    """
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise VlkrError(f"{folder} holds peft's {kind}, expected its plain LoRA")
    weights = _within(folder, _WEIGHTS)
    _tensor_shapes(weights)
    tensors = _read_tensors(weights)
    linears = _linear_targets(model)
    for target in candidates(model):
        if twin := transformers_name(f"{target.module}.{target.slot_name}"):
            linears[twin] = target
    adapters: list[tuple[Target, Adapter]] = []
    for key in tensors:
        name, is_factor, _ = key.removeprefix(_PREFIX).partition(".lora_A.weight")
        if not is_factor:
            if not key.endswith(".lora_B.weight"):
                raise VlkrError(f"{folder} holds {key!r}, expected lora_A and lora_B alone")
            continue
        if name not in linears:
            raise VlkrError(f"{folder} adapts {name}, which is not a linear layer of the model")
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
        adapters.append((target, adapter))
    if not adapters:
        raise VlkrError(f"{weights} holds no LoRA factors")
    return adapters


def _linear_targets(model: nn.Module) -> dict[str, Target]:
    return {t.module: t for t in candidates(model) if t.slot == ("weight", None)}


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
    """Loads the factors of the KRAdapter authors' layers into the model's linear layers.

    Args:
        model: its linear layers have the names in ``state``.
        state: a state dict with ``<module>.weight (m, k1)``, the factor that is initialized to
            zero, and ``<module>.v_weight (m, k2)``.
        scale: their ``scale``.
        adapter_name: name of the adapters in the model.

    Raises:
        VlkrError: if there is no ``v_weight``, or a factor does not fit.
    """
    linears = _linear_targets(model)
    adapters: list[tuple[Target, Adapter]] = []
    for key, v in state.items():
        name, is_factor, _ = key.partition(".v_weight")
        if not is_factor:
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
        adapters.append((target, adapter))
    if not adapters:
        raise VlkrError("the state dict holds no .v_weight of a KRAdapter layer")
    inject_adapters(model, adapters, adapter_name)
    return [target for target, _ in adapters]
