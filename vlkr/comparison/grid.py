"""The options that all grids share, and the cells that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from vlkr.adapters.registry import ADAPTERS, adapter_class, check_options
from vlkr.comparison.plan import PROBE, ZERO_SHOT, Candidate, Cell, EvalSet, Reading, slug
from vlkr.datasets import DataOptions
from vlkr.errors import VlkrError
from vlkr.models.clip import absolute_names
from vlkr.training.options import AdapterOptions, OptimizerOptions, TrainerOptions


@dataclass(frozen=True)
class MethodOptions:
    """A method of a grid.

    Args:
        name: ``zero-shot``, ``probe`` (logistic regression on frozen image features), or an
            adapter such as ``kradapter``; ``full`` trains the same weights fully.
        label: in tables; the name by default.
        options: of the adapter, e.g. ``{rank: 8}``.
        lrs: learning rates to choose from, in place of the grid's.
        epochs: numbers of epochs to choose from, in place of the grid's.
    """

    name: str
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lrs: list[float] | None = None
    epochs: list[int] | None = None


@dataclass(frozen=True)
class GridOptions:
    """What ``compare``, ``dg`` and ``transfer`` have in common.

    Args:
        model: ``tiny``, an open_clip name, ``hf-hub:org/repo``, ``local-dir:/path`` or
            ``timm:NAME``.
        pretrained: open_clip's tag or a path of weights.
        methods: names, or mappings with ``name``, ``label``, ``options``, ``lrs``, ``epochs``.
        reference: label of the method that the others are compared with.
        budget: ``match METHOD`` gives every adapter whose size can be chosen that method's
            parameter count; ``own`` leaves all as they are.
        seeds: of the few-shot split, the initial factors, the order and the augmentation.
        lrs: learning rates to choose from on validation; ``optimizer.lr`` by default.
        epochs: numbers of epochs to choose from on validation; ``trainer.epochs`` by default.
        steps_per_shot: train for this many steps times shots, spread over the epochs, in place of
            ``data.min_steps_per_epoch``.
        targets: short names (``q k v qkv out fc1 fc2``) or shell patterns of module names.
        towers: ``visual``, ``text`` or both.
        blocks: indices of transformer blocks, negative from the end; none takes all.
        data: dataset, shots and batches.
        optimizer: weight decay and its kin.
        trainer: precision and device.
        jobs: processes, each with one thread; 1 computes in this one, 0 only reports what is done.
        launcher: ``local``, or a command for a scheduler that gets each cell's own command in
            place of ``{command}``, and its name in place of ``{cell}``:
            ``sbatch --job-name {cell} --wrap {command}``.
        cell: compute these cells of the plan in ``output`` and nothing else, ``all`` for every one
            that is left; needs no other option.
        dry_run: print the plan, compute nothing.
        force: compute cells again whose configuration has changed.
    """

    model: str = "tiny"
    pretrained: str | None = None
    methods: list[str | MethodOptions] = field(
        default_factory=lambda: [ZERO_SHOT, PROBE, "kradapter", "lora", "full"]
    )
    reference: str = "lora"
    budget: str = "match kradapter"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    lrs: list[float] | None = None
    epochs: list[int] | None = None
    steps_per_shot: int | None = None
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out", "fc1", "fc2"])
    towers: list[str] = field(default_factory=lambda: ["visual", "text"])
    blocks: list[int] | None = None
    data: DataOptions = DataOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    trainer: TrainerOptions = TrainerOptions()
    jobs: int = 1
    launcher: str = "local"
    cell: list[str] | None = None
    dry_run: bool = False
    force: bool = False

    def check(self) -> None:
        """Raises :class:`VlkrError` for an option that does not make sense."""
        for name, numbers in (("seeds", self.seeds), ("lrs", self.lrs), ("epochs", self.epochs)):
            if numbers is not None and (not numbers or len(set(numbers)) < len(numbers)):
                raise VlkrError(
                    f"{name} {numbers} is empty or repeats itself, expected different numbers"
                )
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise VlkrError(f"seed {seed} is out of range, expected 0 to {2**32 - 1}")
        if self.jobs < 0:
            raise VlkrError(f"jobs {self.jobs} is negative, expected 0 or more")
        if self.steps_per_shot is not None and self.steps_per_shot < 1:
            raise VlkrError(
                f"steps_per_shot {self.steps_per_shot} is too small, expected 1 or more"
            )
        if self.launcher != "local" and "{command}" not in self.launcher:
            raise VlkrError(f"launcher {self.launcher!r} lacks {{command}}, or is not 'local'")
        if self.trainer.devices > 1 or self.trainer.num_nodes > 1:
            raise VlkrError(
                "a cell trains on one device; --jobs and --launcher share out the cells"
            )
        methods = self.resolved()
        if self.model.startswith("timm:") and any(m.kind == ZERO_SHOT for m in methods):
            raise VlkrError(
                f"{self.model} has no text for {ZERO_SHOT}; leave it out of the methods"
            )
        labels = [method.label for method in methods]
        for label in labels:
            if labels.count(label) > 1:
                raise VlkrError(f"two methods are labelled {label!r}; give them a label each")
        for method in methods:
            for setting in filter(None, method.settings):
                replace(self.optimizer, lr=setting["lr"]).check()
                replace(self.trainer, epochs=int(setting["epochs"])).check()

    def resolved(self) -> list[Method]:
        """The methods, with their adapters and settings.

        Raises:
            VlkrError: for an unknown method, option or budget.
        """
        given = [MethodOptions(m) if isinstance(m, str) else m for m in self.methods]
        if not given:
            raise VlkrError("methods is empty, expected e.g. zero-shot kradapter lora")
        match = self._match()
        # The method to meet counts with the options that it has in this grid.
        match_options = next((m.options for m in given if m.name == match), {})
        return [self._method(m, match, match_options) for m in given]

    def _match(self) -> str | None:
        word, _, name = self.budget.partition(" ")
        if self.budget == "own":
            return None
        if word != "match" or not name:
            raise VlkrError(f"budget {self.budget!r} is neither 'own' nor 'match METHOD'")
        adapter_class(name.strip())
        return name.strip()

    def _method(
        self, given: MethodOptions, match: str | None, match_options: dict[str, Any]
    ) -> Method:
        label = given.label or " ".join(
            [given.name, *(f"{key}={value}" for key, value in given.options.items())]
        )
        if given.name in (ZERO_SHOT, PROBE):
            return Method(label, given.name)
        if given.name not in ADAPTERS:
            known = ", ".join((ZERO_SHOT, PROBE, *ADAPTERS))
            raise VlkrError(f"unknown method {given.name!r}; known: {known}")
        check_options(given.name, given.options)
        size = adapter_class(given.name).budget_option
        matched = match is not None and size is not None and given.name != match
        if matched and size in given.options:
            raise VlkrError(
                f"method {label!r} has its own {size}, and budget {self.budget!r} chooses it; "
                "leave one of them out (budget: own)"
            )
        adapter = AdapterOptions(
            given.name,
            self.targets,
            self.towers,
            self.blocks,
            given.options,
            match if matched else None,
        )
        settings = [
            {"lr": lr, "epochs": epochs}
            for lr in given.lrs or self.lrs or [self.optimizer.lr]
            for epochs in given.epochs or self.epochs or [self.trainer.epochs]
        ]
        return Method(label, "adapter", adapter, match_options if matched else {}, settings)

    def cells(
        self, method: Method, where: tuple[object, ...], data: DataOptions, sets: list[EvalSet]
    ) -> list[tuple[dict[str, float], list[Cell]]]:
        """A method's cells in one place of the grid: for each setting, one a seed.

        Args:
            method: resolved.
            where: names of the place, for the cells' ids.
            data: to train on.
            sets: what the cells are measured on.
        """
        model, pretrained = absolute_names(self.model, self.pretrained)
        found = []
        for setting in method.settings:
            trainer, options, name = self.trainer, data, [*where, method.label]
            if method.kind == "adapter":
                epochs = int(setting["epochs"])
                trainer = replace(trainer, epochs=epochs)
                if self.steps_per_shot is not None:
                    steps = math.ceil(self.steps_per_shot * data.shots / epochs)
                    options = replace(data, min_steps_per_epoch=steps)
                name += [f"lr{setting['lr']:g}", f"epochs{epochs}"]
            seeds: list[int | None] = [None] if method.kind == ZERO_SHOT else [*self.seeds]
            cells = [
                Cell(
                    slug(*name, *([] if seed is None else [f"seed{seed}"])),
                    method.kind,
                    model,
                    pretrained,
                    options,
                    tuple(sets),
                    seed,
                    method.adapter,
                    method.match_options,
                    replace(self.optimizer, lr=setting.get("lr", self.optimizer.lr)),
                    trainer,
                )
                for seed in seeds
            ]
            found.append((setting, cells))
        return found


@dataclass(frozen=True)
class Method:
    """A method of a grid, resolved.

    Attributes:
        label: in tables.
        kind: of its cells.
        adapter: for kind ``adapter``.
        match_options: of the method whose budget is to be met.
        settings: learning rates and epochs to choose from; one empty setting for the others.
    """

    label: str
    kind: str
    adapter: AdapterOptions = AdapterOptions()
    match_options: dict[str, Any] = field(default_factory=dict)
    settings: list[dict[str, float]] = field(default_factory=lambda: [{}])


def candidate(setting: dict[str, float], cells: list[Cell], set_name: str | None) -> Candidate:
    """A candidate whose own cells carry the validation accuracy.

    Args:
        setting: of these cells.
        cells: one a seed.
        set_name: the validation set among their sets; None for the one of their training.
    """
    ids = tuple(cell.id for cell in cells)
    return Candidate(setting, ids, tuple(Reading(i, set_name) for i in ids))
