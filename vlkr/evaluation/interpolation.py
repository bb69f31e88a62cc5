"""Interpolates between a run's base model and its adapter, and beyond (WiSE-FT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vlkr.adapters import set_adapter_scale
from vlkr.errors import VlkrError
from vlkr.evaluation.evaluate import evaluate_model, with_shifts
from vlkr.evaluation.metrics import DatasetResult
from vlkr.evaluation.report import Evaluation
from vlkr.files import check_free, write_json, write_text
from vlkr.reporting.table import Table, percent
from vlkr.runs import RunFolder, adapter_scale

BEST = "best"
_TITLE = "Top-1 accuracy along the adapter"


@dataclass(frozen=True)
class Point:
    """The model with its adapter's weight update times ``alpha``.

    Attributes:
        alpha: 0 is the base model, 1 the adapted one.
        validation: result on the run's validation images; None if there are none.
        evaluation: evaluation in-distribution and under shift.
    """

    alpha: float
    validation: DatasetResult | None
    evaluation: Evaluation


@dataclass
class Interpolation:
    """A run's accuracy along its adapter.

    Attributes:
        points: by increasing alpha.
        context: what the numbers depend on.
        output: folder that was written, if any.
        saved: alpha that was saved there as a run, if any.
    """

    points: list[Point]
    context: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    saved: float | None = None
    exit_code = 0

    @property
    def best(self) -> Point | None:
        """The point with the highest top-1 accuracy on the validation images, ties by their NLL."""
        scores = [
            (point.validation.metrics["acc1"], -point.validation.metrics["nll"], point)
            for point in self.points
            if point.validation is not None
        ]
        return max(scores, key=lambda score: score[:2])[2] if scores else None

    def tables(self) -> list[Table]:
        """Returns one row per alpha, the best one starred."""
        first = self.points[0].evaluation
        header = ["alpha", "validation %", f"{first.in_distribution.dataset} (in-distribution) %"]
        shifts = first.shifts
        if len(shifts) == 1:
            header.append(f"{shifts[0].dataset} %")
        elif shifts:
            header += [f"mean of {len(shifts)} shifts %", "worst shift %"]
        rows = []
        for point in self.points:
            evaluation, validation = point.evaluation, point.validation
            row = [
                f"{point.alpha:g}{' *' if point is self.best else ''}",
                "" if validation is None else percent(validation.metrics["acc1"]),
                percent(evaluation.in_distribution.metrics["acc1"]),
            ]
            if shifts:
                row.append(percent(evaluation.mean_shift()))
            if len(shifts) > 1:
                row.append(percent(evaluation.worst_shift().metrics["acc1"]))
            rows.append(row)
        return [Table.of(_TITLE, [header, *rows])]

    def note(self) -> str:
        """Returns how the best alpha was chosen, and what the numbers depend on."""
        validation = self.points[0].validation
        rule = (
            "No best alpha: the run has no validation image, and the test split is not to choose on"
            if validation is None or self.best is None
            else f"* best alpha {self.best.alpha:g}: highest top-1 on the run's {validation.images}"
            " validation images, ties by their likelihood"
        )
        return f"{rule}. {self.points[0].evaluation.caption(self.context)}"

    def lines(self) -> list[str]:
        """Returns the note, and what was written."""
        if self.output is None:
            return [self.note()]
        saved = "" if self.saved is None else f", a run with alpha {self.saved:g} in it"
        return [self.note(), f"Written: {self.output}{saved}"]

    def to_json(self) -> dict[str, Any]:
        """Returns the context and every point."""
        return {
            **self.context,
            "best_alpha": None if self.best is None else self.best.alpha,
            "saved_alpha": self.saved,
            "points": [
                {
                    "alpha": point.alpha,
                    "validation": None
                    if point.validation is None
                    else {"images": point.validation.images, "metrics": point.validation.metrics},
                    **point.evaluation.to_json(),
                }
                for point in self.points
            ],
        }

    def plot(self, path: Path) -> None:
        """Draws accuracy under shift over in-distribution accuracy, one point per alpha."""
        from vlkr.reporting.figures import BLUE, GRAY, ORANGE, panels, plain, save_figure

        figure, (axes,) = panels(1, 6.4, 5, 1)
        evaluations = [point.evaluation for point in self.points]
        x = [100 * e.in_distribution.metrics["acc1"] for e in evaluations]
        shifts = evaluations[0].shifts
        for i, shift in enumerate(shifts):
            y = [100 * e.shifts[i].metrics["acc1"] for e in evaluations]
            axes.plot(x, y, color=GRAY, linewidth=0.8)
            axes.annotate(shift.dataset, (x[-1], y[-1]), fontsize=7, color=GRAY)
        means = [100 * e.mean_shift() for e in evaluations]
        name = shifts[0].dataset if len(shifts) == 1 else f"mean of {len(shifts)} shifts"
        axes.plot(x, means, "o-", color=BLUE, markersize=4, label=name)
        for point, place in zip(self.points, zip(x, means, strict=True), strict=True):
            if point is self.best:
                axes.plot(*place, "*", color=ORANGE, markersize=14, label="best on validation")
            style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": BLUE}
            axes.annotate(f"{point.alpha:g}", place, (4, 4), **style)
        axes.set_xlabel(
            f"top-1 accuracy on {evaluations[0].in_distribution.dataset} (in-distribution), %"
        )
        axes.set_ylabel("top-1 accuracy under shift, %")
        axes.set_title("Along the adapter, by alpha", loc="left")
        axes.legend(frameon=False)
        plain(axes)
        save_figure(figure, path)

    def write(self, output: Path) -> None:
        """Writes ``interpolation.json``, ``report.md`` and, with shifts, ``interpolation.png``."""
        write_json(output / "interpolation.json", self.to_json())
        (table,) = self.tables()
        write_text(output / "report.md", f"# {_TITLE}\n\n{table.markdown()}\n{self.note()}.\n")
        if self.points[0].evaluation.shifts:
            self.plot(output / "interpolation.png")


def interpolate(
    run: Path,
    datasets: list[str] | None = None,
    include_shifts: bool = True,
    alphas: list[float] | None = None,
    save: str | None = None,
    split: str = "test",
    templates: list[str] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    cache: bool = True,
    output: Path | None = None,
    force: bool = False,
) -> Interpolation:
    """Evaluates a run between its base model and its adapter, and beyond (WiSE-FT).

    The options are those of ``vlkr interpolate``, whose help describes them.

    Raises:
        VlkrError: for a run or dataset that cannot be read, or ``save best`` without a validation
            image.
    """
    steps = _check_alphas([i / 10 for i in range(11)] if alphas is None else alphas)
    wanted = None if save in (None, BEST) else _alpha(str(save))
    if save is not None and output is None:
        raise VlkrError(f"--save {save} needs a folder to write to: --output DIR")
    if output is not None:
        check_free(output, force=force)
    folder = RunFolder.open(run)
    bundle, data = folder.load_model(), folder.config.data
    context = folder.config.context(adapter_scale(bundle))
    validation = folder.validation(templates)
    if save == BEST and validation is None:
        raise VlkrError(
            f"--save best needs validation images, and {run} has none: its classes have no more "
            "images than the shots; give an alpha"
        )
    templates = data.templates if templates is None else templates
    first = folder.dataset() if datasets is None else None
    loaded = with_shifts(first, datasets or [], include_shifts, templates, data.test_fraction)
    trained = adapter_scale(bundle)
    console = Console(stderr=True)

    def measure(alpha: float) -> Point:
        console.print(f"alpha {alpha:g}", style="bold", highlight=False)
        set_adapter_scale(bundle.model, alpha * trained)
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "device": device,
            "cache": cache,
        }
        validated = None
        if validation is not None:
            validated = evaluate_model(bundle, [validation], split="val", **options).in_distribution
        return Point(alpha, validated, evaluate_model(bundle, loaded, split=split, **options))

    try:
        result = Interpolation([measure(alpha) for alpha in steps], context, output)
    finally:
        set_adapter_scale(bundle.model, trained)
    result.context = {**result.points[0].evaluation.context, **context}
    if output is not None:
        if save is not None:
            assert result.best is not None or wanted is not None
            result.saved = result.best.alpha if wanted is None and result.best else wanted
        result.write(output)
        if result.saved is not None:
            RunFolder(output, folder.config).save_scaled(bundle, result.saved * trained)
    return result


def _check_alphas(alphas: Sequence[float]) -> list[float]:
    if not alphas:
        raise VlkrError("the list of alphas is empty, expected e.g. 0 0.5 1")
    for alpha in alphas:
        if not math.isfinite(alpha):
            raise VlkrError(f"alpha {alpha} is not a finite number")
    return sorted(set(alphas))


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError as error:
        raise VlkrError(f"--save {text!r} is neither a number nor 'best'") from error
    return _check_alphas([alpha])[0]
