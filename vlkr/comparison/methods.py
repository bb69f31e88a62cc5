"""The methods of a grid: what its options mean, and whether they make sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vlkr.adapters.registry import ADAPTERS, adapter_class, check_options
from vlkr.comparison.options import PROBE, ZERO_SHOT, GridConfig, MethodConfig
from vlkr.config import AdapterConfig
from vlkr.errors import VlkrError
from vlkr.models.names import is_timm

CellKind = Literal["zero-shot", "probe", "adapter", "run"]


@dataclass(frozen=True)
class Method:
    """A method of a grid with its defaults filled in.

    Attributes:
        label: name in tables.
        kind: kind of its cells.
        adapter: for kind ``adapter``.
        match_options: options of the method whose parameter count is to be met.
        settings: learning rates and epochs to choose from; one empty setting for other kinds.
    """

    label: str
    kind: CellKind
    adapter: AdapterConfig = AdapterConfig()
    match_options: dict[str, Any] = field(default_factory=dict)
    settings: list[dict[str, float]] = field(default_factory=lambda: [{}])


def check_grid(grid: GridConfig) -> None:
    """Raises :class:`VlkrError` for an option that does not make sense."""
    lists: dict[str, Sequence[float] | None] = {"seeds": grid.seeds}
    owners: list[tuple[str, GridConfig | MethodConfig]] = [("", grid)]
    for of, owner in [*owners, *((f" of {m.name}", m) for m in _method_configs(grid))]:
        lists |= {f"lrs{of}": owner.lrs, f"epochs{of}": owner.epochs}
    for name, numbers in lists.items():
        if numbers is not None and (not numbers or len(set(numbers)) < len(numbers)):
            raise VlkrError(
                f"{name} {numbers} is empty or repeats itself, expected different numbers"
            )
    for seed in grid.seeds:
        if not 0 <= seed < 2**32:
            raise VlkrError(f"seed {seed} is out of range, expected 0 to {2**32 - 1}")
    if grid.jobs < 0:
        raise VlkrError(f"jobs {grid.jobs} is negative, expected 0 or more")
    if grid.jobs == 0 and grid.force:
        raise VlkrError("jobs 0 computes nothing, so that there is nothing to force")
    if grid.steps_per_shot is not None and grid.steps_per_shot < 1:
        raise VlkrError(f"steps_per_shot {grid.steps_per_shot} is too small, expected 1 or more")
    if grid.launcher != "local" and "{command}" not in grid.launcher:
        raise VlkrError(f"launcher {grid.launcher!r} lacks {{command}}, or is not 'local'")
    if grid.trainer.devices > 1 or grid.trainer.num_nodes > 1:
        raise VlkrError("a cell trains on one device; --jobs and --launcher distribute the cells")
    methods = resolve_methods(grid)
    if is_timm(grid.model) and any(m.kind == ZERO_SHOT for m in methods):
        raise VlkrError(f"{grid.model} has no text for {ZERO_SHOT}; leave it out of the methods")
    labels = [method.label for method in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise VlkrError(f"two methods are labeled {label!r}; give each its own label")
    if grid.reference not in labels and grid.reference != GridConfig.reference:
        raise VlkrError(
            f"reference {grid.reference!r} is none of the methods, which are {', '.join(labels)}"
        )
    for method in methods:
        for setting in filter(None, method.settings):
            replace(grid.optimizer, lr=setting["lr"]).check()
            replace(grid.trainer, epochs=int(setting["epochs"])).check()


def resolve_methods(grid: GridConfig) -> list[Method]:
    """Returns the methods with their adapters and settings.

    Raises:
        VlkrError: for an unknown method, option or budget.
    """
    configs = _method_configs(grid)
    if not configs:
        raise VlkrError("methods is empty, expected e.g. zero-shot kradapter lora")
    match = _matched_method(grid.budget)
    # The method to match counts with the options that it has in this grid.
    match_options = next((m.options for m in configs if m.name == match), {})
    return [_resolve(grid, m, match, match_options) for m in configs]


def _method_configs(grid: GridConfig) -> list[MethodConfig]:
    return [MethodConfig(m) if isinstance(m, str) else m for m in grid.methods]


def _matched_method(budget: str) -> str | None:
    if budget == "own":
        return None
    word, _, name = budget.partition(" ")
    if word != "match" or not name:
        raise VlkrError(f"budget {budget!r} is neither 'own' nor 'match METHOD'")
    adapter_class(name.strip())
    return name.strip()


def _resolve(
    grid: GridConfig, config: MethodConfig, match: str | None, match_options: dict[str, Any]
) -> Method:
    name, options = config.name, config.options
    label = config.label or " ".join([name, *(f"{k}={v}" for k, v in options.items())])
    if name in (ZERO_SHOT, PROBE):
        return Method(label, "zero-shot" if name == ZERO_SHOT else "probe")
    if name not in ADAPTERS:
        known = ", ".join((ZERO_SHOT, PROBE, *ADAPTERS))
        raise VlkrError(f"unknown method {name!r}; known: {known}")
    check_options(name, options)
    size = adapter_class(name).budget_option
    matched = match is not None and size is not None and name != match
    if matched and size in options:
        raise VlkrError(
            f"method {label!r} has its own {size}, and budget {grid.budget!r} chooses it; "
            "leave one of them out (budget: own)"
        )
    adapter = AdapterConfig(
        name, grid.targets, grid.towers, grid.blocks, options, match if matched else None
    )
    settings = [
        {"lr": lr, "epochs": epochs}
        for lr in config.lrs or grid.lrs or [grid.optimizer.lr]
        for epochs in config.epochs or grid.epochs or [grid.trainer.epochs]
    ]
    return Method(label, "adapter", adapter, match_options if matched else {}, settings)


def base_context(grid: GridConfig, choice: str) -> dict[str, Any]:
    """Returns what the numbers of every grid depend on, as far as it is known beforehand.

    Args:
        grid: options.
        choice: how learning rate and epochs are chosen, where there are several.
    """
    pretrained = {} if grid.pretrained is None else {"pretrained": grid.pretrained}
    trained = [method for method in resolve_methods(grid) if method.kind == "adapter"]
    recipe = {
        "budget": grid.budget,
        "targets": " ".join(grid.targets),
        "towers": " ".join(grid.towers),
        **({} if grid.blocks is None else {"blocks": " ".join(map(str, grid.blocks))}),
        "batch size": grid.data.batch_size,
        "weight decay": grid.optimizer.weight_decay,
        "learning rate": _setting_text(trained, "lr", choice),
        "epochs": _setting_text(trained, "epochs", choice),
    }
    return {
        "model": grid.model,
        **pretrained,
        **(recipe if trained else {}),
        "seeds": " ".join(map(str, grid.seeds)),
        "checkpoint": "last iteration",
        "spread": "standard deviation over seeds",
    }


def _setting_text(methods: Sequence[Method], key: str, choice: str) -> str:
    """One value, a value per method, or how it is chosen."""
    values = {m.label: " ".join(dict.fromkeys(f"{s[key]:g}" for s in m.settings)) for m in methods}
    different = set(values.values())
    if any(" " in value for value in different):
        return choice
    if len(different) == 1:
        return different.pop()
    return ", ".join(f"{value} of {label}" for label, value in values.items())
