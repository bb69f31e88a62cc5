"""The command ``vlkr demo``: KRAdapter and LoRA at equal budget on what ships, home and shifts."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vlkr.cli.options import Switch
from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
from vlkr.datasets import DataConfig, load_dataset
from vlkr.evaluation.report import Evaluation
from vlkr.files import check_free, write_json, write_text
from vlkr.reporting.table import Table
from vlkr.training.adapt import adapt

METHODS = {"kradapter": "KRAdapter", "lora": "LoRA"}


@dataclass
class DemoResult:
    """What the demonstration measured.

    Attributes:
        evaluations: by method (``zero-shot`` and the adapters), one a seed.
        parameters: trained, by adapter.
        exported: the KRAdapter of the first seed, written and reloaded.
        context: what the numbers depend on.
        output: folder with ``report.md``, ``results.json`` and ``accuracy.png``.
    """

    evaluations: dict[str, list[Evaluation]]
    parameters: dict[str, int]
    exported: Any
    context: dict[str, Any]
    output: Path

    def rows(self) -> list[list[str]]:
        """The table: a row a dataset, a column a method, mean and standard deviation over seeds."""
        first = self.evaluations["zero-shot"][0]
        header = ["top-1 %", *(self._label(method) for method in self.evaluations)]
        rows = [header, ["trained parameters", "0", *(f"{n:,}" for n in self.parameters.values())]]
        for i, result in enumerate(first.results):
            name = f"{result.dataset} (home)" if i == 0 else result.dataset
            rows.append([name, *(spread(v) for v in self.accuracies(i).values())])
        means = {m: [e.mean_shift() for e in es] for m, es in self.evaluations.items()}
        worst = {
            m: [e.worst_shift().metrics["acc1"] for e in es] for m, es in self.evaluations.items()
        }
        rows.append(["mean of shifts", *(spread(v) for v in means.values())])
        rows.append(["worst shift", *(spread(v) for v in worst.values())])
        return rows

    def accuracies(self, index: int) -> dict[str, list[float]]:
        """Top-1 of the dataset at ``index``, by method, one a seed."""
        return {
            method: [e.results[index].metrics["acc1"] for e in evaluations]
            for method, evaluations in self.evaluations.items()
        }

    def caption(self) -> str:
        """The context in one line."""
        return ", ".join(f"{key} {value}" for key, value in self.context.items())

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "context": self.context,
            "parameters": self.parameters,
            "evaluations": {m: [e.to_json() for e in es] for m, es in self.evaluations.items()},
            "export": {"folder": str(self.exported.folder), **self.exported.parity.to_json()},
        }

    def show(self, console: Console) -> None:
        """Prints the table, its context and where everything lies."""
        console.print(Table.of("Top-1 accuracy at home and under shift", self.rows()).rich())
        console.print(self.caption(), style="dim", highlight=False)
        self.exported.show(console)
        console.print(f"Chart: {self.output / 'accuracy.png'}", highlight=False)

    @staticmethod
    def _label(method: str) -> str:
        return METHODS.get(method, method)


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent.

    >>> spread([0.5, 0.7]), spread([0.5])
    ('60.0 ± 14.1', '50.0')
    """
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def demo(
    *, output: Path = Path("runs/demo"), quick: Switch = False, force: Switch = False
) -> DemoResult:
    """Adapts the tiny CLIP to handwritten digits with KRAdapter and with LoRA at equal budget.

    Args:
        output: folder for the runs, the table, the chart and the exported encoder.
        quick: one seed and few steps, to see that everything works.
        force: replace what is there.

    Raises:
        VlkrError: if ``output`` holds something.
    """
    import torch

    check_free(output, force=force)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast for a model this small, and the same sums on any machine
    try:
        return _demo(output, quick, force)
    finally:
        torch.set_num_threads(threads)


def _demo(output: Path, quick: bool, force: bool) -> DemoResult:
    from vlkr.evaluation.evaluate import evaluate_model
    from vlkr.export.export import export
    from vlkr.models.clip import load_clip
    from vlkr.models.names import TINY

    seeds = [1] if quick else [1, 2, 3]
    epochs = 2 if quick else 20
    console = Console(stderr=True)
    home = load_dataset("digits")
    datasets = [home, *(load_dataset(name) for name in home.shifts)]
    zero_shot = evaluate_model(load_clip(TINY), datasets, device="cpu")
    evaluations = {"zero-shot": [zero_shot]}
    parameters: dict[str, int] = {}
    for method, label in METHODS.items():
        evaluations[method] = []
        for seed in seeds:
            console.print(f"[bold]{label}[/], seed {seed}")
            try:
                result = adapt(
                    output / "runs" / f"{method}-seed{seed}",
                    adapter=AdapterConfig(
                        method, match=None if method == "kradapter" else "kradapter"
                    ),
                    data=DataConfig("digits", shots=16, crop_scale=(0.7, 1.0), flip=False),
                    optimizer=OptimizerConfig(),
                    trainer=TrainerConfig(epochs=epochs, accelerator="cpu"),
                    seed=seed,
                    force=force,
                )
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt("start again with --force") from error
            evaluations[method].append(evaluate_model(result.bundle, datasets, device="cpu"))
            parameters[method] = result.parameters
    exported = export(output / "runs" / "kradapter-seed1", output / "export", force=force)
    context = {
        "model": f"tiny (weights {zero_shot.context['weights_sha256'][:12]})",
        "shots": 16,
        "epochs": epochs,
        "seeds": " ".join(map(str, seeds)),
        "split": "test",
        "templates": home.template_set,
        "learning rate": OptimizerConfig().lr,
        "checkpoint": "last iteration",
    }
    if len(seeds) > 1:
        context["spread"] = "standard deviation over seeds"
    done = DemoResult(evaluations, parameters, exported, context, output)
    write_json(output / "results.json", done.to_json())
    write_text(
        output / "report.md",
        f"# Demo\n\n{Table.of('', done.rows()).markdown()}\n{done.caption()}.\n",
    )
    plot(done, output / "accuracy.png")
    return done


def plot(result: DemoResult, path: Path) -> None:
    """Bars of top-1 accuracy, a group a dataset, a colour a method, whiskers over seeds."""
    from matplotlib.figure import Figure

    from vlkr.reporting.figures import save_figure

    names = [r.dataset for r in result.evaluations["zero-shot"][0].results]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(result.evaluations)
    colors = {"zero-shot": "#9a9a9a", "kradapter": "#1b6ca8", "lora": "#e08a1e"}
    for i, method in enumerate(result.evaluations):
        values = [result.accuracies(j)[method] for j in range(len(names))]
        axes.bar(
            [j + (i - 1) * width for j in range(len(names))],
            [100 * statistics.mean(v) for v in values],
            width,
            yerr=[100 * statistics.stdev(v) for v in values] if len(values[0]) > 1 else None,
            capsize=2,
            label=METHODS.get(method, method),
            color=colors[method],
        )
    labels = [f"{names[0]}\n(home)", *(n.removeprefix(f"{names[0]}-") for n in names[1:])]
    axes.set_xticks(range(len(names)), labels)
    axes.axhline(10, color="black", linewidth=0.8, linestyle=":", label="chance")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_ylim(0, 100)
    axes.set_title("Tiny CLIP, 16 shots of handwritten digits: at home and under shift", loc="left")
    figure.legend(frameon=False, ncols=4, loc="outside lower center")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
