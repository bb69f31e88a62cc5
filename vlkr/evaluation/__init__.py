"""Evaluation in-distribution and under domain shift."""
