"""The command ``vlkr spectrum``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlkr.errors import VlkrError
from vlkr.files import check_free

if TYPE_CHECKING:
    from vlkr.evaluation.spectrum_report import Spectra


def spectrum(
    run: list[Path],
    shifts: bool = True,
    device: str = "auto",
    output: Path | None = None,
    force: bool = False,
) -> Spectra:
    """Singular values, ranks and norms of what runs changed, layer by layer, methods side by side.

    Args:
        run: folders written by ``vlkr adapt``, one or many.
        shifts: over three runs or more, also measure each one under the shifts of its home
            dataset and correlate its spectra with the accuracy that it loses there.
        device: where to evaluate.
        output: folder for ``spectrum.json``, ``report.md``, ``heatmap.png`` and ``curves.png``.
        force: write into a folder that holds something.

    Raises:
        VlkrError: if a folder is not a finished run, or changed no weight.
    """
    from vlkr.evaluation.runs import load_run, run_labels
    from vlkr.evaluation.spectra import correlations, model_spectra, shift_loss
    from vlkr.evaluation.spectrum_report import Run, Spectra, write_report

    if not run:
        raise VlkrError("no run is given, expected --run DIR ...")
    if output is not None:
        check_free(output, force=force)
    loaded = [load_run(folder) for folder in run]
    labels = run_labels({folder: config for folder, (_, config) in zip(run, loaded, strict=True)})
    runs = []
    for folder, (bundle, _) in zip(run, loaded, strict=True):
        layers = model_spectra(bundle.model)
        if not layers:
            raise VlkrError(f"{folder} changed no weight: {labels[folder]!r} adapts something else")
        runs.append(Run(str(folder), labels[folder], layers))
    if shifts and len(runs) > 2:
        for folder, found in zip(run, runs, strict=True):
            found.shift_loss = shift_loss(folder, device)
    result = Spectra(runs, correlations(runs), output)
    if output is not None:
        write_report(result, output)
    return result
