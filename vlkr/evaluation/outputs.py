"""What ``vlkr evaluate --output`` writes."""

from __future__ import annotations

import json
from pathlib import Path

from vlkr.evaluation.plots import plot_reliability
from vlkr.evaluation.report import Evaluation, evaluation_markdown
from vlkr.files import write_json, write_text


def write_evaluation(evaluation: Evaluation, output: Path) -> None:
    """Writes metrics, report, confusion matrices, reliability diagrams and kept predictions.

    Args:
        evaluation: any.
        output: folder, for ``metrics.json``, ``report.md``, ``confusion.json`` (class names and
            counts by dataset, rows are labels), ``reliability.png`` and
            ``predictions/DATASET.jsonl``.
    """
    write_json(output / "metrics.json", evaluation.to_json())
    write_text(output / "report.md", evaluation_markdown(evaluation))
    confusion = {
        r.dataset: {"class_names": r.class_names, "counts": r.confusion} for r in evaluation.results
    }
    write_text(output / "confusion.json", json.dumps(confusion) + "\n")
    plot_reliability(evaluation.results, output / "reliability.png")
    for r in evaluation.results:
        if r.predictions is not None:
            r.predictions.write_jsonl(output / "predictions" / f"{r.dataset}.jsonl")
