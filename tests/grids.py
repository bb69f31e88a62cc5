"""Grids with their options as keyword arguments."""

from pathlib import Path

from vlkr.comparison.compare import run_compare
from vlkr.comparison.dg import run_dg
from vlkr.comparison.options import GridConfig
from vlkr.comparison.transfer import run_transfer

NOWHERE = Path("nowhere")
"""For dry runs, which write nothing."""


def compare(output=NOWHERE, *, datasets=None, shifts=None, shots=None, spectra=False, **grid):
    own = {"datasets": datasets, "shifts": shifts, "shots": shots, "spectra": spectra}
    return run_compare(GridConfig(**grid), output, **own)


def dg(output=NOWHERE, *, selection="training-domain", **grid):
    return run_dg(GridConfig(**grid), output, selection=selection)


def transfer(output=NOWHERE, *, runs=None, datasets=None, **grid):
    return run_transfer(GridConfig(**grid), output, runs=runs, datasets=datasets)
