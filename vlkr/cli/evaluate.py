"""``vlkr evaluate``, ``vlkr interpolate`` and ``vlkr spectrum``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkr.cli.options import Switch


def evaluate(
    *,
    model: str | None = None,
    pretrained: str | None = None,
    run: Path | None = None,
    datasets: list[str] | None = None,
    include_shifts: bool = True,
    unknown: list[str] | None = None,
    reference: list[Path] | None = None,
    split: str = "test",
    templates: list[str] | None = None,
    test_fraction: float | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    devices: int = 1,
    cache: bool = True,
    keep_predictions: Switch = False,
    max_bad: int = 0,
    output: Path | None = None,
    force: Switch = False,
) -> Any:
    """Evaluates a model in-distribution and under domain shift.

    Args:
        model: for zero-shot: ``tiny``, an open_clip name, ``hf-hub:org/repo``, ``local-dir:/path``.
        pretrained: open_clip tag or path of weights.
        run: for an adapted model: folder written by ``vlkr adapt``.
        datasets: card names or folders, the in-distribution dataset first; the run's own by
            default.
        include_shifts: also evaluate the shifts that the card of the first dataset names.
        unknown: datasets of classes that the first dataset lacks; measures how well confidence
            tells them apart (AUROC).
        reference: ``metrics.json`` of zero-shot evaluations on the same datasets; measures
            effective robustness relative to their line, or to the line from chance to a single
            one.
        split: split of each dataset.
        templates: in place of each dataset's own: prompts with ``{c}``, ``imagenet80``,
            ``imagenet7``, a set of the dataset's card, or a file with one prompt per line.
        test_fraction: fraction of images held out for testing if a folder has no splits; by
            default the run's, or 0.5. A run's own dataset keeps the run's.
        batch_size: images per batch.
        num_workers: processes that decode images; 0 decodes in the main one.
        device: ``auto``, ``cpu``, ``cuda``, ...
        devices: number of evaluation processes; ignored under ``torchrun``.
        cache: keep class embeddings, and image features of an image tower without adapters, in
            ``$VLKR_CACHE`` (``~/.cache/vlkr``).
        keep_predictions: write per-image predictions, ``predictions/DATASET.jsonl``.
        max_bad: maximum number of invalid images to skip per dataset before failing.
        output: folder for ``metrics.json``, ``report.md``, ``confusion.json`` and
            ``reliability.png``.
        force: allow a non-empty output folder.
    """
    options = locals()
    from vlkr.evaluation.evaluate import evaluate

    return evaluate(**options)


def interpolate(
    *,
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
    force: Switch = False,
) -> Any:
    """Evaluates a run between its base model and its adapter, and beyond (WiSE-FT).

    The weight update is scaled by alpha, which moves every adapted weight along the line of
    Wortsman et al. (2022, arXiv 2109.01903, section 3). The best alpha is chosen on the run's
    validation images: the dataset's own split ``val``, or the few that were set aside. Learned
    class embeddings of a model without text stay as they are.

    Args:
        run: folder written by ``vlkr adapt``.
        datasets: card names or folders, the in-distribution dataset first; the run's own by
            default.
        include_shifts: also evaluate the shifts that the card of the first dataset names.
        alphas: scales of the adapter; 0, 0.1, ..., 1 by default.
        save: an alpha, or ``best``: makes ``output`` a run folder with the scaled adapter, for
            ``vlkr evaluate`` and ``vlkr export``.
        split: split of each dataset.
        templates: in place of each dataset's own, as for ``vlkr evaluate``.
        batch_size: images per batch.
        num_workers: processes that decode images.
        device: ``auto``, ``cpu``, ``cuda``, ...
        cache: keep class embeddings, and image features where the image tower has no adapter, in
            ``$VLKR_CACHE`` (``~/.cache/vlkr``).
        output: folder for ``interpolation.json``, ``report.md`` and ``interpolation.png``.
        force: allow a non-empty output folder.
    """
    options = locals()
    from vlkr.evaluation.interpolation import interpolate

    return interpolate(**options)


def spectrum(
    *,
    run: list[Path],
    include_shifts: bool = True,
    device: str = "auto",
    output: Path | None = None,
    force: Switch = False,
) -> Any:
    """Shows singular values, ranks and norms of the weight updates of runs, side by side.

    Args:
        run: folders written by ``vlkr adapt``.
        include_shifts: for three runs or more, also evaluate each one under the shifts of its
            dataset and correlate its spectra with its drop in accuracy there.
        device: device to evaluate on.
        output: folder for ``spectrum.json``, ``report.md``, ``heatmap.png`` and ``curves.png``.
        force: allow a non-empty output folder.
    """
    from vlkr.analysis.spectrum import spectrum

    return spectrum(run, include_shifts, device, output, force)
