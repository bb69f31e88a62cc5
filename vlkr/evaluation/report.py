"""Results as a person reads them and as a program reads them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlkr.errors import printable

if TYPE_CHECKING:
    from vlkr.evaluation.metrics import Confused, DomainAccuracy
    from vlkr.evaluation.predictions import Predictions

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


@dataclass(frozen=True)
class ReliabilityBin:
    """The images whose confidence lies in ``[lower, upper)``, of the last bin also ``upper``.

    Attributes:
        lower: edge.
        upper: edge.
        images: their number, at least 1.
        confidence: their mean.
        accuracy: the fraction predicted correctly.
    """

    lower: float
    upper: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class DatasetResult:
    """One dataset's metrics.

    Attributes:
        dataset: name.
        split: name.
        images: number of them.
        templates: name of the template set.
        metrics: by name; fractions in [0, 1], and ``nll`` in nats.
        domains: number of images and top-1 accuracy by domain, where the data tells.
        reliability: bins of the reliability diagram.
        worst_confusions: the classes taken for others most often.
        class_names: by label.
        confusion: counts, rows are labels.
        predictions: what was said of each image, if that was asked for.
    """

    dataset: str
    split: str
    images: int
    templates: str
    metrics: dict[str, float]
    domains: dict[str, DomainAccuracy] = field(default_factory=dict)
    reliability: list[ReliabilityBin] = field(default_factory=list)
    worst_confusions: list[Confused] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    confusion: list[list[int]] = field(default_factory=list, repr=False)
    predictions: Predictions | None = field(default=None, repr=False)


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
        console.print(rich_table(evaluation_rows(self), title(self)))
        for rows in _more_rows(self):
            console.print(rich_table(rows, ""))
        console.print(caption(self), style="dim", highlight=False, markup=False)

    def to_json(self) -> dict[str, Any]:
        """The context, and results in CLIP_benchmark's form."""
        return {
            **self.context,
            "results": [self._result(r) for r in self.results],
            **self._summary(),
        }

    def _result(self, r: DatasetResult) -> dict[str, Any]:
        details = {
            "domains": {name: asdict(domain) for name, domain in r.domains.items()},
            "reliability": [asdict(part) for part in r.reliability],
            "worst_confusions": [asdict(pair) for pair in r.worst_confusions],
        }
        return {
            "dataset": r.dataset,
            "model": self.context.get("model"),
            "pretrained": self.context.get("pretrained"),
            "task": "zeroshot_classification",
            "split": r.split,
            "images": r.images,
            "templates": r.templates,
            "metrics": r.metrics,
            "language": "en",
            **{name: value for name, value in details.items() if value},
        }

    def _summary(self) -> dict[str, Any]:
        if not self.shifts:
            return {}
        worst = self.worst_shift()
        return {
            "mean_of_shifts": {m: round(self.mean_shift(m), 6) for m in columns(self)},
            "worst_shift": {"dataset": worst.dataset, "metrics": worst.metrics},
        }


def title(evaluation: Evaluation) -> str:
    """What the table measures."""
    number = len(evaluation.shifts)
    shifts = f" and under {number} shift{'s' if number > 1 else ''}" if number else ""
    return printable(f"Accuracy on {evaluation.home.dataset}{shifts}")


def columns(evaluation: Evaluation) -> list[str]:
    """The table's metrics: those of ``METRICS`` that every dataset has."""
    return [name for name in METRICS if all(name in r.metrics for r in evaluation.results)]


def cell(metric: str, value: float) -> str:
    """A value as tables show it: percent, and nats with three digits.

    >>> cell("acc1", 0.5), cell("nll", 0.5)
    ('50.0', '0.500')
    """
    return f"{value:.3f}" if metric == "nll" else f"{100 * value:.1f}"


def evaluation_rows(evaluation: Evaluation) -> list[list[str]]:
    """The table's cells: a header, home, each shift, and of two shifts or more mean and worst."""
    shown = columns(evaluation)
    rows = [["dataset", "images", *(METRICS[m] for m in shown)]]
    rows += [
        [r.dataset, str(r.images), *(cell(m, r.metrics[m]) for m in shown)]
        for r in evaluation.results
    ]
    if len(evaluation.shifts) > 1:
        means = (cell(m, evaluation.mean_shift(m)) for m in shown)
        rows.append([f"mean of {len(evaluation.shifts)} shifts", "", *means])
        worst = evaluation.worst_shift()
        cells = (cell(m, worst.metrics[m]) for m in shown)
        rows.append([f"worst: {worst.dataset}", str(worst.images), *cells])
    return rows


def caption(evaluation: Evaluation, context: dict[str, Any] | None = None) -> str:
    """What an evaluation's numbers depend on, in one line.

    Args:
        evaluation: its split and templates are named.
        context: in place of the evaluation's.
    """
    context = {
        **(evaluation.context if context is None else context),
        "split": evaluation.home.split,
        "templates": evaluation.home.templates,
    }
    if isinstance(context.get("weights_sha256"), str):
        context["weights_sha256"] = context["weights_sha256"][:12]
    told = (f"{key} {value}" for key, value in context.items() if value is not None)
    return printable(", ".join(told))


def rich_table(rows: list[list[str]], title: str, note: str = "") -> Table:
    """A table for the terminal, from cells whose first row is the header."""
    table = Table(
        title=Text(printable(title)),
        caption=Text(printable(note)) if note else None,
        title_justify="left",
        caption_justify="left",
    )
    for i, name in enumerate(rows[0]):
        widest = max((len(row[i]) for row in rows[1:]), default=0)
        if i == 0:
            table.add_column(Text(printable(name)), no_wrap=True)
        else:  # a header may wrap, a number is whole or it misleads
            table.add_column(Text(printable(name)), justify="right", min_width=widest)
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))  # names are no markup
    return table


def markdown_table(rows: list[list[str]]) -> str:
    """The same cells in Markdown."""
    cells = [[markdown_text(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, "|" + "|".join("---" if i == 0 else "---:" for i in range(len(rows[0]))) + "|")
    return "\n".join(lines) + "\n"


def markdown_text(text: str) -> str:
    r"""Text that is shown as it is: no tags, links or line breaks.

    >>> markdown_text("<b>[x]")
    '&lt;b>\\[x]'
    """
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")


def _more_rows(evaluation: Evaluation) -> list[list[list[str]]]:
    """A table for each dataset that has domains, or metrics that not every dataset has."""
    tables = []
    for r in evaluation.results:
        more = [(MORE_METRICS[m], r.metrics[m]) for m in MORE_METRICS if m in r.metrics]
        rows = [["", r.dataset], *([label, cell("", value)] for label, value in more)]
        rows += [
            [f"{name} ({d.images} images), top-1 %", cell("acc1", d.acc1)]
            for name, d in r.domains.items()
        ]
        if len(rows) > 1:
            tables.append(rows)
    return tables


def evaluation_markdown(evaluation: Evaluation) -> str:
    """Tables and context as a Markdown page."""
    parts = [
        f"# {markdown_text(title(evaluation))}\n\n{markdown_table(evaluation_rows(evaluation))}",
        f"{markdown_text(caption(evaluation))}.\n",
    ]
    parts += map(markdown_table, _more_rows(evaluation))
    confused = [
        [r.dataset, pair.label, pair.predicted, str(pair.images), cell("", pair.fraction)]
        for r in evaluation.results
        for pair in r.worst_confusions
    ]
    if confused:
        header = ["dataset", "class", "taken for", "images", "of the class's %"]
        parts.append(f"## Most confused\n\n{markdown_table([header, *confused])}")
    return "\n".join(parts)
