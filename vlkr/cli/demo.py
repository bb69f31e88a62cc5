"""``vlkr demo``: KRAdapter and LoRA of equal size on bundled data, in-distribution and shifted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vlkr.cli.options import Switch
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig, load_dataset
from vlkr.files import check_free, write_json, write_text
from vlkr.reporting.table import Table, caption, mean_std

ZERO_SHOT = "zero-shot"
LABELS = {ZERO_SHOT: ZERO_SHOT, "kradapter": "KRAdapter", "lora": "LoRA"}


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured.

    Attributes:
        evaluations: by method (``zero-shot`` and the adapters), one per seed.
        parameters: number of trained parameters, by adapter.
        exported: the KRAdapter of the first seed, written and reloaded.
        context: what the numbers depend on.
        output: folder with ``report.md``, ``results.json`` and ``accuracy.png``.
    """

    evaluations: dict[str, list[Any]]
    parameters: dict[str, int]
    exported: Any
    context: dict[str, Any]
    output: Path
    exit_code: int = 0

    def tables(self) -> list[Table]:
        """Returns a row per dataset and a column per method."""
        columns = list(self.evaluations.values())
        rows = [["top-1 %", *(LABELS[method] for method in self.evaluations)]]
        rows.append(["trained parameters", "0", *(f"{n:,}" for n in self.parameters.values())])
        for i, name in enumerate(self.names()):
            label = f"{name} (in-distribution)" if i == 0 else name
            rows.append([label, *map(mean_std, self.accuracies(i).values())])
        rows.append(["mean of shifts", *(mean_std([e.mean_shift() for e in es]) for es in columns)])
        worst = ([e.worst_shift().metrics["acc1"] for e in es] for es in columns)
        rows.append(["worst shift", *map(mean_std, worst)])
        title = "Top-1 accuracy in-distribution and under shift"
        return [Table.of(title, rows, caption(self.context))]

    def lines(self) -> list[str]:
        """Returns where the export and the chart are."""
        return [*self.exported.lines(), f"Chart: {self.output / 'accuracy.png'}"]

    def names(self) -> list[str]:
        """Returns the names of the datasets, the in-distribution one first."""
        return [result.dataset for result in self.evaluations[ZERO_SHOT][0].results]

    def accuracies(self, index: int) -> dict[str, list[float]]:
        """Returns the top-1 accuracies on the dataset at ``index``, by method, one per seed."""
        return {
            method: [e.results[index].metrics["acc1"] for e in evaluations]
            for method, evaluations in self.evaluations.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain JSON."""
        return {
            "context": self.context,
            "parameters": self.parameters,
            "evaluations": {m: [e.to_json() for e in es] for m, es in self.evaluations.items()},
            "export": {"folder": str(self.exported.folder), **self.exported.to_json()["parity"]},
        }


def demo(
    *, output: Path = Path("runs/demo"), quick: Switch = False, force: Switch = False
) -> DemoResult:
    """Adapts the tiny CLIP to handwritten digits with KRAdapter and with LoRA of equal size.

    Args:
        output: folder for the runs, the table, the chart and the exported encoder.
        quick: one seed and few steps, to check that everything works.
        force: replace what is there.
    """
    check_free(output, force=force)
    with _one_thread():
        result = _run(output, quick, force)
    write_json(output / "results.json", result.to_json())
    (table,) = result.tables()
    write_text(output / "report.md", f"# Demo\n\n{table.markdown()}\n{table.note}.\n")
    plot(result, output / "accuracy.png")
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Computes with one thread: as fast for so small a model, and the same sums on any machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(output: Path, quick: bool, force: bool) -> DemoResult:
    from vlkr.evaluation.evaluate import evaluate_model
    from vlkr.export.export import export
    from vlkr.models.clip import load_clip
    from vlkr.models.names import TINY
    from vlkr.training.recipe import adapt

    seeds, epochs = ([1], 2) if quick else ([1, 2, 3], 20)
    digits = load_dataset("digits")
    datasets = [digits, *map(load_dataset, digits.shifts)]
    evaluations = {ZERO_SHOT: [evaluate_model(load_clip(TINY), datasets, device="cpu")]}
    parameters = {}
    for method in ("kradapter", "lora"):
        evaluations[method] = []
        for seed in seeds:
            Console(stderr=True).print(f"[bold]{LABELS[method]}[/], seed {seed}")
            try:
                run = adapt(
                    output / "runs" / f"{method}-seed{seed}",
                    adapter=AdapterConfig(method, match={"lora": "kradapter"}.get(method)),
                    data=DataConfig("digits", shots=16, crop_scale=(0.7, 1.0), flip=False),
                    trainer=TrainerConfig(epochs=epochs, accelerator="cpu"),
                    seed=seed,
                    force=force,
                )
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt("start over with --force") from error
            evaluations[method].append(evaluate_model(run.bundle, datasets, device="cpu"))
            parameters[method] = run.parameters
    exported = export(output / "runs" / "kradapter-seed1", output / "export", force=force)
    weights = evaluations[ZERO_SHOT][0].context["weights_sha256"]
    context = {
        "model": f"tiny (weights {weights[:12]})",
        "shots": 16,
        "epochs": epochs,
        "seeds": " ".join(map(str, seeds)),
        "split": "test",
        "templates": digits.template_set,
        "learning rate": OptimizerConfig().lr,
        "checkpoint": "last iteration",
    }
    if len(seeds) > 1:
        context["spread"] = "standard deviation over seeds"
    return DemoResult(evaluations, parameters, exported, context, output)


def plot(result: DemoResult, path: Path) -> None:
    """Draws bars of top-1 accuracy, grouped by dataset, with whiskers over seeds."""
    from matplotlib.figure import Figure

    from vlkr.reporting.figures import BLUE, GRAY, ORANGE, bars, plain, save_figure

    digits, *shifts = result.names()
    groups = [f"{digits}\n(in-distribution)", *(name.removeprefix(f"{digits}-") for name in shifts)]
    columns = [result.accuracies(i) for i in range(len(groups))]
    values = {LABELS[m]: [column[m] for column in columns] for m in result.evaluations}
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    bars(axes, groups, values, dict(zip(values, (GRAY, BLUE, ORANGE), strict=True)))
    axes.axhline(10, color="black", linewidth=0.8, linestyle=":", label="chance")
    axes.set_title("Tiny CLIP, 16 shots of handwritten digits, and under shift", loc="left")
    figure.legend(frameon=False, ncols=4, loc="outside lower center")
    plain(axes)
    save_figure(figure, path)
