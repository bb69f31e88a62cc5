"""Reports an evaluation for people (tables, Markdown, a figure) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlkr.errors import printable
from vlkr.evaluation.metrics import DatasetResult
from vlkr.files import write_json, write_text
from vlkr.reporting.table import Table, caption, markdown_text, percent

METRICS = {
    "acc1": "top-1 %",
    "acc5": "top-5 %",
    "mean_per_class_recall": "mean per class %",
    "f1": "F1 %",
    "ece": "ECE %",
    "nll": "NLL",
}
MORE_METRICS = {
    "auroc": "AUROC known against unknown %",
    "mean_domain_acc1": "mean of domains, top-1 %",
    "worst_domain_acc1": "worst domain, top-1 %",
    "effective_robustness": "effective robustness, points",
}


@dataclass
class Evaluation:
    """One model on an in-distribution dataset and on shifted ones.

    Attributes:
        results: one per dataset, the in-distribution one first.
        context: what the numbers depend on: model, weights' hash, adapter, shots, seed, ...
    """

    results: list[DatasetResult]
    context: dict[str, Any] = field(default_factory=dict)
    exit_code = 0

    @property
    def in_distribution(self) -> DatasetResult:
        """The first dataset's result."""
        return self.results[0]

    @property
    def shifts(self) -> list[DatasetResult]:
        """The results of all datasets but the first."""
        return self.results[1:]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics in the table: those that every dataset has."""
        return [name for name in METRICS if all(name in r.metrics for r in self.results)]

    @property
    def title(self) -> str:
        """Title of the table."""
        number = len(self.shifts)
        shifts = f" and under {number} shift{'s' if number > 1 else ''}" if number else ""
        return printable(f"Accuracy on {self.in_distribution.dataset}{shifts}")

    def mean_shift(self, metric: str = "acc1") -> float:
        """Returns the unweighted mean of a metric over the shifted datasets."""
        return sum(r.metrics[metric] for r in self.shifts) / len(self.shifts)

    def worst_shift(self) -> DatasetResult:
        """Returns the shifted dataset with the lowest top-1 accuracy."""
        return min(self.shifts, key=lambda r: r.metrics["acc1"])

    def caption(self, context: dict[str, Any] | None = None) -> str:
        """Returns in one line what the numbers depend on; ``context`` replaces the own one."""
        first = self.in_distribution
        context = self.context if context is None else context
        return caption({**context, "split": first.split, "templates": first.templates})

    def tables(self) -> list[Table]:
        """Returns the main table, and one per dataset with domains or further metrics."""
        shown = self.metrics

        def row(name: str, images: str, value: Callable[[str], float]) -> list[str]:
            return [name, images, *(format_metric(metric, value(metric)) for metric in shown)]

        rows = [["dataset", "images", *(METRICS[metric] for metric in shown)]]
        rows += [row(r.dataset, str(r.images), r.metrics.__getitem__) for r in self.results]
        if len(self.shifts) > 1:
            rows.append(row(f"mean of {len(self.shifts)} shifts", "", self.mean_shift))
            worst = self.worst_shift()
            values = worst.metrics.__getitem__
            rows.append(row(f"worst: {worst.dataset}", str(worst.images), values))
        tables = [Table.of(self.title, rows)]
        for r in self.results:
            more = [
                [MORE_METRICS[m], percent(r.metrics[m])] for m in MORE_METRICS if m in r.metrics
            ]
            more += [
                [f"{name} ({domain.images} images), top-1 %", percent(domain.acc1)]
                for name, domain in r.domains.items()
            ]
            if more:
                tables.append(Table.of("", [["", r.dataset], *more]))
        return tables

    def lines(self) -> list[str]:
        """Returns the caption."""
        return [self.caption()]

    def markdown(self) -> str:
        """Returns tables, caption and the most frequent confusions as a Markdown page."""
        first, *more = self.tables()
        parts = [f"# {markdown_text(self.title)}\n\n{first.markdown()}"]
        parts.append(f"{markdown_text(self.caption())}.\n")
        parts += [table.markdown() for table in more]
        confused = [
            [r.dataset, pair.label, pair.predicted, str(pair.images), percent(pair.fraction)]
            for r in self.results
            for pair in r.worst_confusions
        ]
        if confused:
            header = ["dataset", "class", "taken for", "images", "of the class's %"]
            parts.append(f"## Most confused\n\n{Table.of('', [header, *confused]).markdown()}")
        return "\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Returns the context, and results in CLIP_benchmark's form."""
        names = {key: self.context.get(key) for key in ("model", "pretrained")}
        results = [{"dataset": r.dataset, **names, **r.to_json()} for r in self.results]
        summary = {}
        if self.shifts:
            worst = self.worst_shift()
            summary = {
                "mean_of_shifts": {m: round(self.mean_shift(m), 6) for m in self.metrics},
                "worst_shift": {"dataset": worst.dataset, "metrics": worst.metrics},
            }
        return {**self.context, "results": results, **summary}

    def write(self, output: Path) -> None:
        """Writes ``metrics.json``, ``report.md``, ``confusion.json``, ``reliability.png`` etc.

        Args:
            output: folder; predictions that were kept go to ``predictions/DATASET.jsonl``.
        """
        from vlkr.reporting.figures import Bin, reliability  # imports matplotlib

        write_json(output / "metrics.json", self.to_json())
        write_text(output / "report.md", self.markdown())
        confusion = {
            r.dataset: {"class_names": r.class_names, "counts": r.confusion} for r in self.results
        }
        write_text(output / "confusion.json", json.dumps(confusion) + "\n")
        diagrams = {
            f"{r.dataset}\n{r.images} images, ECE {percent(r.metrics['ece'])} %": [
                Bin(b.lower, b.upper, b.confidence, b.accuracy, b.images / r.images)
                for b in r.reliability
            ]
            for r in self.results
        }
        reliability(output / "reliability.png", diagrams)
        for r in self.results:
            if r.predictions is not None:
                r.predictions.write_jsonl(output / "predictions" / f"{r.dataset}.jsonl")


def format_metric(metric: str, value: float) -> str:
    """Formats a value as tables show it: percent, and nats with three digits.

    >>> format_metric("acc1", 0.5), format_metric("nll", 0.5)
    ('50.0', '0.500')
    """
    return f"{value:.3f}" if metric == "nll" else percent(value)
