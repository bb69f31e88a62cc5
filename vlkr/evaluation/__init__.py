"""Evaluation at home and under domain shift."""
