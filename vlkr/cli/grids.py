"""``vlkr compare``, ``vlkr dg`` and ``vlkr transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vlkr.cli.options import Switch, typed
from vlkr.comparison.options import GridConfig, Selection

Grid = Annotated[GridConfig, Parameter(name="*")]


def compare(
    *,
    output: Path = Path("runs/compare"),
    datasets: list[str] | None = None,
    shifts: list[str] | None = None,
    shots: list[int] | None = None,
    spectra: Switch = False,
    grid: Grid = GridConfig(),
) -> Any:
    """Compares methods in-distribution and under shift, with the uncertainty of their differences.

    Every cell of the grid has its own folder; finished ones are skipped when the command is run
    again, and one that failed is reported and does not stop the others. Learning rates and epochs
    are chosen per method, dataset and shots by their mean validation accuracy.

    Args:
        output: folder of the cells and of the report (``report.html``, ``.md``, ``.tex``,
            ``results.csv``, ``.json``, ``plots/``, ``clip_benchmark/``).
        datasets: card names or folders to adapt to, one at a time; ``data`` by default.
        shifts: datasets under domain shift; those of the dataset's card by default.
        shots: training images per class; ``data.shots`` by default.
        spectra: also show the spectra of the adapters trained with the most shots.
        grid: options that all grids have.
    """
    from vlkr.comparison.compare import run_compare

    return run_compare(
        typed(grid), output, datasets=datasets, shifts=shifts, shots=shots, spectra=spectra
    )


def dg(
    *,
    output: Path = Path("runs/dg"),
    selection: Selection = "training-domain",
    holdout: float = 0.2,
    grid: Grid = GridConfig(),
) -> Any:
    """Domain generalization: adapts to all domains but one and tests on that one, in turn.

    As in DomainBed (Gulrajani and Lopez-Paz, 2021, arXiv 2007.01434), a part of every domain is
    held out; training sees the rest of the training domains, and the accuracy is that on the rest
    of the test domain. Learning rates and epochs are chosen per method and test domain by the mean
    over seeds. ``data.root`` is a tree ``<domain>/<class>/<image>``, and ``data.domains`` names
    some of its domains.

    Args:
        output: folder of the cells and of the report.
        selection: ``training-domain`` chooses by the held-out images of the training domains;
            ``leave-one-domain-out`` by every training domain in turn, left out of training too;
            ``oracle`` by the held-out images of the test domain.
        holdout: fraction of each domain that is held out, of trees without splits of their own.
        grid: options that all grids have.
    """
    from vlkr.comparison.dg import run_dg

    return run_dg(typed(grid), output, selection=selection, holdout=holdout)


def transfer(
    *,
    output: Path = Path("runs/transfer"),
    run: list[Path] | None = None,
    datasets: list[str] | None = None,
    grid: Grid = GridConfig(),
) -> Any:
    """Adapts to one dataset and evaluates on it and on others, zero-shot and adapted.

    The others show the gain under shift (ImageNet -> V2, A, R, Sketch, ObjectNet, each with its
    own classes) and on other tasks, and forgetting. With ``data.classes base`` the new half of the
    classes is among them, and the harmonic mean of both is shown (Zhou et al., 2022, CoCoOp).

    Args:
        output: folder of the cells and of the report.
        run: folders written by ``vlkr adapt``, all on one dataset; nothing is trained then.
        datasets: card names or folders to evaluate on besides the one adapted to; by default the
            shifts of its card.
        grid: options that all grids have.
    """
    from vlkr.comparison.transfer import run_transfer

    return run_transfer(typed(grid), output, runs=run, datasets=datasets)
