"""The spectra of what the adapters of a grid have learned."""

from __future__ import annotations

from vlkr.comparison.outcomes import Collected
from vlkr.comparison.report import Picture
from vlkr.comparison.tables import Table
from vlkr.evaluation.runs import load_run
from vlkr.evaluation.spectra import model_spectra
from vlkr.evaluation.spectrum_report import NOTE, Run, Spectra, plot_curves


def spectra_parts(found: Collected, shots: int) -> tuple[list[Table], list[Picture]]:
    """Table and plot of the first seed's adapters, on the first dataset; none without adapters.

    Args:
        found: the grid's outcomes.
        shots: of the cells to look at.
    """
    first = found.outcomes[0].entry.place["dataset"]
    runs = []
    for method in found.methods:
        outcome = found.at(method, {"dataset": first, "shots": shots})
        if outcome is None or outcome.results[0].cell.kind != "adapter":
            continue
        folder = outcome.results[0].folder / "run"
        layers = model_spectra(load_run(folder)[0].model)
        if layers:
            runs.append(Run(str(folder), method, layers))
    if not runs:
        return [], []
    spectra = Spectra(runs, {})
    table = Table(f"Spectra on {first}, {shots} shots", spectra.method_rows(), NOTE, brief=False)
    title = f"Singular values on {first}, {shots} shots"
    return [table], [Picture("spectra", title, lambda path: plot_curves(spectra, path))]
