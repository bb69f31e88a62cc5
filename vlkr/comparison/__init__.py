"""Grids of runs: methods, shots and seeds side by side, across domains and datasets."""
