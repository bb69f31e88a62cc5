"""The command ``vlkr interpolate``: WiSE-FT along an adapter. Heavy imports wait until it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vlkr.errors import VlkrError
from vlkr.evaluation.report import (
    DatasetResult,
    Evaluation,
    caption,
    cell,
    markdown_table,
    rich_table,
)
from vlkr.files import check_free, write_json, write_text

BEST = "best"
_TITLE = "Top-1 accuracy along the adapter"


@dataclass(frozen=True)
class Point:
    """The model with its adapter's change times ``alpha``.

    Attributes:
        alpha: 0 is the base model, 1 the adapted one.
        validation: on the run's validation images, None where there are none.
        evaluation: at home and under shift.
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
        output: folder that was written, None for none.
        saved: the alpha that was saved there as a run, None for none.
    """

    points: list[Point]
    context: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    saved: float | None = None

    @property
    def best(self) -> Point | None:
        """Highest top-1 accuracy on the validation images, ties by their likelihood."""
        measured = [(point, point.validation) for point in self.points]
        scores = [
            (found.metrics["acc1"], -found.metrics["nll"], point)
            for point, found in measured
            if found is not None
        ]
        return max(scores, key=lambda score: score[:2])[2] if scores else None

    def rows(self) -> list[list[str]]:
        """The table: a row an alpha, the best one starred."""
        first = self.points[0].evaluation
        header = ["alpha", "validation %", f"{first.home.dataset} (home) %"]
        shifts = first.shifts
        if len(shifts) == 1:
            header.append(f"{shifts[0].dataset} %")
        elif shifts:
            header += [f"mean of {len(shifts)} shifts %", "worst shift %"]
        return [header, *(self._row(point) for point in self.points)]

    def _row(self, point: Point) -> list[str]:
        found = point.evaluation
        validation = point.validation
        row = [
            f"{point.alpha:g}{' *' if point is self.best else ''}",
            "" if validation is None else cell("acc1", validation.metrics["acc1"]),
            cell("acc1", found.home.metrics["acc1"]),
        ]
        if found.shifts:
            row.append(cell("acc1", found.mean_shift()))
        if len(found.shifts) > 1:
            row.append(cell("acc1", found.worst_shift().metrics["acc1"]))
        return row

    def note(self) -> str:
        """How the best alpha was chosen, and what the numbers depend on."""
        validation = self.points[0].validation
        rule = (
            "No best alpha: the run has no validation image, and the test split is not to choose on"
            if validation is None or self.best is None
            else f"* best alpha {self.best.alpha:g}: highest top-1 on the run's {validation.images}"
            " validation images, ties by their likelihood"
        )
        return f"{rule}. {caption(self.points[0].evaluation, self.context)}"

    def show(self, console: Console) -> None:
        """Prints the table, its context and where everything lies."""
        console.print(rich_table(self.rows(), _TITLE))
        console.print(self.note(), style="dim", highlight=False, markup=False)
        if self.output is not None:
            saved = "" if self.saved is None else f", a run with alpha {self.saved:g} in it"
            console.print(f"Written: {self.output}{saved}", highlight=False, markup=False)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
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


def interpolate(
    run: Path,
    datasets: list[str] | None = None,
    shifts: bool = True,
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
    """Measures a run between its base model and its adapter, and beyond (WiSE-FT).

    The adapter's change is scaled by alpha, which moves every adapted weight along the line of
    Wortsman et al. (2022, arXiv 2109.01903, section 3). The best alpha is chosen on the run's
    validation images: the dataset's own split ``val``, or the few that were set aside. Class
    embeddings that a model without text has learnt stay as they are.

    Args:
        run: folder written by ``vlkr adapt``.
        datasets: cards' names or folders, the home dataset first; the run's own by default.
        shifts: also measure the shifts that the home dataset's card names.
        alphas: 0, 0.1, ..., 1 by default.
        save: an alpha, or ``best``: makes ``output`` a run folder with the scaled adapter, for
            ``vlkr evaluate`` and ``vlkr export``.
        split: which split of each dataset is measured.
        templates: in place of each dataset's own, as for ``vlkr evaluate``.
        batch_size: images at a time.
        num_workers: processes that decode images.
        device: ``auto``, ``cpu``, ``cuda``, ...
        cache: keep class embeddings, and image features where the image tower has no adapter, on
            disk.
        output: folder for ``interpolation.json``, ``report.md`` and ``interpolation.png``.
        force: write into a folder that holds something.

    Raises:
        VlkrError: for a run or dataset that cannot be read, or ``save best`` without a validation
            image.
    """
    from vlkr.adapters import set_adapter_scale
    from vlkr.evaluation.zero_shot import evaluate_bundle, with_shifts
    from vlkr.runs import RunFolder, adapter_scale

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
    home = folder.dataset() if datasets is None else None
    loaded = with_shifts(home, datasets or [], shifts, templates, data.test_fraction)
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
        seen = None
        if validation is not None:
            seen = evaluate_bundle(bundle, [validation], split="val", **options).home
        return Point(alpha, seen, evaluate_bundle(bundle, loaded, split=split, **options))

    try:
        result = Interpolation([measure(alpha) for alpha in steps], context, output)
    finally:
        set_adapter_scale(bundle.model, trained)
    result.context = {**result.points[0].evaluation.context, **context}
    if output is not None:
        if save is not None:
            assert result.best is not None or wanted is not None
            result.saved = result.best.alpha if wanted is None and result.best else wanted
        _write(result, output)
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


def _write(result: Interpolation, output: Path) -> None:
    from vlkr.evaluation.plots import plot_interpolation

    write_json(output / "interpolation.json", result.to_json())
    table = markdown_table(result.rows())
    write_text(output / "report.md", f"# {_TITLE}\n\n{table}\n{result.note()}.\n")
    if result.points[0].evaluation.shifts:
        plot_interpolation(result, output / "interpolation.png")
