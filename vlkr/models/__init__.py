"""CLIP models and their zero-shot classifiers."""
