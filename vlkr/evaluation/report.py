"""Results as a person reads them and as a program reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

METRICS = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean per class",
    "ece": "ECE",
}


@dataclass(frozen=True)
class DatasetResult:
    """One dataset's metrics.

    Attributes:
        dataset: name.
        split: name.
        images: number of them.
        templates: name of the template set.
        metrics: by name, each in [0, 1].
    """

    dataset: str
    split: str
    images: int
    templates: str
    metrics: dict[str, float]


@dataclass
class Evaluation:
    """One model on its home dataset and, after it, on shifted ones.

    Attributes:
        results: the home dataset's first.
        context: what the numbers depend on: model, weights' hash, adapter, shots, seed, ...
    """

    results: list[DatasetResult]
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> DatasetResult:
        """The first dataset's result."""
        return self.results[0]

    @property
    def shifts(self) -> list[DatasetResult]:
        """The other datasets' results."""
        return self.results[1:]

    def mean_shift(self, metric: str = "acc1") -> float:
        """Mean of a metric over the shifted datasets, each with the same weight."""
        return sum(r.metrics[metric] for r in self.shifts) / len(self.shifts)

    def worst_shift(self) -> DatasetResult:
        """The shifted dataset with the lowest top-1 accuracy."""
        return min(self.shifts, key=lambda r: r.metrics["acc1"])

    def show(self, console: Console) -> None:
        """Prints the table and its context."""
        console.print(rich_table(evaluation_rows(self), f"Accuracy on {self.home.dataset}"))
        console.print(caption(self), style="dim", highlight=False, markup=False)

    def to_json(self) -> dict[str, Any]:
        """The context, and results in CLIP_benchmark's form."""
        return {
            **self.context,
            "results": [
                {
                    "dataset": r.dataset,
                    "model": self.context.get("model"),
                    "pretrained": self.context.get("pretrained"),
                    "task": "zeroshot_classification",
                    "split": r.split,
                    "images": r.images,
                    "templates": r.templates,
                    "metrics": r.metrics,
                    "language": "en",
                }
                for r in self.results
            ],
            **self._summary(),
        }

    def _summary(self) -> dict[str, Any]:
        if not self.shifts:
            return {}
        worst = self.worst_shift()
        return {
            "mean_of_shifts": {m: round(self.mean_shift(m), 6) for m in METRICS},
            "worst_shift": {"dataset": worst.dataset, "metrics": worst.metrics},
        }


def evaluation_rows(evaluation: Evaluation) -> list[list[str]]:
    """The table's cells: a header, home, each shift, their mean and the worst."""
    rows = [["dataset", "images", *(f"{label} %" for label in METRICS.values())]]
    rows += [
        [r.dataset, str(r.images), *(f"{100 * r.metrics[m]:.1f}" for m in METRICS)]
        for r in evaluation.results
    ]
    if evaluation.shifts:
        means = (f"{100 * evaluation.mean_shift(m):.1f}" for m in METRICS)
        number = len(evaluation.shifts)
        rows.append([f"mean of {number} shift{'s' if number > 1 else ''}", "", *means])
        worst = evaluation.worst_shift()
        cells = (f"{100 * worst.metrics[m]:.1f}" for m in METRICS)
        rows.append([f"worst shift ({worst.dataset})", str(worst.images), *cells])
    return rows


def caption(evaluation: Evaluation) -> str:
    """The context in one line."""
    context = {
        **evaluation.context,
        "split": evaluation.home.split,
        "templates": evaluation.home.templates,
    }
    if isinstance(context.get("weights_sha256"), str):
        context["weights_sha256"] = context["weights_sha256"][:12]
    return ", ".join(f"{key} {value}" for key, value in context.items() if value is not None)


def rich_table(rows: list[list[str]], title: str, note: str = "") -> Table:
    """A table for the terminal, from cells whose first row is the header."""
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown_table(rows: list[list[str]]) -> str:
    """The same cells in Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, "|" + "|".join("---" if i == 0 else "---:" for i in range(len(rows[0]))) + "|")
    return "\n".join(lines) + "\n"


def evaluation_markdown(evaluation: Evaluation) -> str:
    """Table and context as a Markdown page."""
    table = markdown_table(evaluation_rows(evaluation))
    return f"# Evaluation\n\n{table}\n{caption(evaluation)}.\n"
