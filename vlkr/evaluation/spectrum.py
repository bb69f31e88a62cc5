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
    from vlkr.evaluation.spectra import correlations, model_spectra, shift_loss
    from vlkr.evaluation.spectrum_report import Run, Spectra, write_report
    from vlkr.runs import RunFolder, method_labels

    if not run:
        raise VlkrError("no run is given, expected --run DIR ...")
    if output is not None:
        check_free(output, force=force)
    folders = [RunFolder.open(path) for path in run]
    labels = method_labels(folders)
    runs = []
    for folder in folders:
        layers = model_spectra(folder.load_model().model)
        label = labels[folder.path]
        if not layers:
            raise VlkrError(f"{folder.path} changed no weight: {label!r} adapts something else")
        runs.append(Run(str(folder.path), label, layers))
    if shifts and len(runs) > 2:
        for folder, found in zip(run, runs, strict=True):
            found.shift_loss = shift_loss(folder, device)
    result = Spectra(runs, correlations(runs), output)
    if output is not None:
        write_report(result, output)
    return result
