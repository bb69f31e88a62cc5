"""The commands ``vlkr compare``, ``dg`` and ``transfer``.

Heavy imports wait until one of them runs, so that help is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkr.comparison.options import GridConfig, Selection


def compare(
    output: Path = Path("runs/compare"),
    datasets: list[str] | None = None,
    shifts: list[str] | None = None,
    shots: list[int] | None = None,
    spectra: bool = False,
    **grid: Any,
) -> Any:
    """Compares methods at home and under shift, with the uncertainty of their differences.

    Every cell of the grid is a folder of its own; finished ones are skipped when the command is
    given again, and one that failed is reported and does not stop the others. Learning rates and
    epochs are chosen per method, dataset and shots by their mean validation accuracy.

    Args:
        output: folder of the cells and of the report (``report.html``, ``.md``, ``.tex``,
            ``results.csv``, ``.json``, ``plots/``, ``clip_benchmark/``).
        datasets: cards' names or folders to adapt to, each on its own; ``data`` by default.
        shifts: datasets that shift the home dataset's domain; those of its card by default.
        shots: training images a class; ``data.shots`` by default.
        spectra: also show the spectra of what the adapters of the largest shots have learned.
        **grid: options of :class:`~vlkr.comparison.options.GridConfig`.

    Raises:
        VlkrError: for any option that does not make sense, before anything is written; or if no
            cell could be computed.
    """
    from vlkr.comparison.compare import run_compare

    return run_compare(
        GridConfig(**grid), output, datasets=datasets, shifts=shifts, shots=shots, spectra=spectra
    )


def dg(
    output: Path = Path("runs/dg"),
    selection: Selection = "training-domain",
    holdout: float = 0.2,
    **grid: Any,
) -> Any:
    """Domain generalization: adapts to all domains but one, and tests on that one, in turn.

    As in DomainBed (Gulrajani and Lopez-Paz, 2021, arXiv 2007.01434): a part of every domain is
    held out; training sees the rest of the training domains, and the accuracy is that on the rest
    of the test domain. What is chosen, among the learning rates and epochs that are given, is
    chosen per method and test domain by the mean over seeds.

    Args:
        output: folder of the cells and of the report.
        selection: ``training-domain`` chooses by the held-out images of the training domains;
            ``leave-one-domain-out`` by every training domain in turn, left out of training too;
            ``oracle`` by the held-out images of the test domain.
        holdout: part of each domain that is held out, of trees without splits of their own.
        **grid: options of :class:`~vlkr.comparison.options.GridConfig`; ``data.root`` is a tree
            ``<domain>/<class>/<image>``, and ``data.domains`` names some of its domains.

    Raises:
        VlkrError: for a dataset without domains, or any option that does not make sense, before
            anything is written.
    """
    from vlkr.comparison.dg import run_dg

    return run_dg(GridConfig(**grid), output, selection=selection, holdout=holdout)


def transfer(
    output: Path = Path("runs/transfer"),
    run: list[Path] | None = None,
    datasets: list[str] | None = None,
    **grid: Any,
) -> Any:
    """Adapts to one dataset and measures on it and on others, zero-shot before and adapted after.

    The others show what is gained under shift (ImageNet -> V2, A, R, Sketch, ObjectNet, each with
    its own classes), on other tasks, and what is forgotten. With ``data.classes base`` the new
    half of the classes is among them, and the harmonic mean of both is shown (Zhou et al., 2022,
    CoCoOp).

    Args:
        output: folder of the cells and of the report.
        run: folders written by ``vlkr adapt``, all on one dataset; nothing is trained then.
        datasets: cards' names or folders to measure on beside the one adapted to; by default the
            shifts of its card.
        **grid: options of :class:`~vlkr.comparison.options.GridConfig`; ``data`` is adapted to.

    Raises:
        VlkrError: for any option that does not make sense, before anything is written.
    """
    from vlkr.comparison.transfer import run_transfer

    return run_transfer(GridConfig(**grid), output, runs=run, datasets=datasets)
