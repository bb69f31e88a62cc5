"""Per-image predictions, from which every metric is computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlkr.errors import VlkrError
from vlkr.files import write_text

# Columns, and their names in JSON.
_COLUMNS = {
    "keys": "key",
    "labels": "label",
    "predicted": "predicted",
    "confidence": "confidence",
    "in_top5": "in_top5",
    "nll": "nll",
    "domains": "domain",
}


@dataclass(frozen=True)
class Predictions:
    """One entry per image in each list, sorted by key.

    Attributes:
        keys: keys of the samples.
        labels: indices into the class names.
        predicted: the class with the largest logit.
        confidence: its softmax probability.
        in_top5: whether the label is among the five largest logits.
        nll: negative log-likelihood of the label, in nats.
        domains: domains of the samples; None if the data has none.
    """

    keys: list[str]
    labels: list[int]
    predicted: list[int]
    confidence: list[float]
    in_top5: list[bool]
    nll: list[float]
    domains: list[str | None]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def joined(cls, parts: Iterable[Predictions]) -> Predictions:
        """Returns all entries, in an order that does not depend on how samples were split."""
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for part in parts:
            for name, values in columns.items():
                values.extend(getattr(part, name))
        keys, labels = columns["keys"], columns["labels"]
        order = sorted(range(len(keys)), key=lambda i: (keys[i], labels[i]))
        return cls(**{name: [values[i] for i in order] for name, values in columns.items()})

    def write_jsonl(self, path: Path) -> None:
        """Writes JSON Lines, one object per image."""
        rows = zip(*(getattr(self, name) for name in _COLUMNS), strict=True)
        lines = [json.dumps(dict(zip(_COLUMNS.values(), row, strict=True))) for row in rows]
        write_text(path, "".join(f"{line}\n" for line in lines))

    @classmethod
    def read_jsonl(cls, path: Path) -> Predictions:
        """Reads what :meth:`write_jsonl` wrote.

        Raises:
            VlkrError: if the file cannot be read or does not hold predictions.
        """
        try:
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            columns = {name: [row[key] for row in rows] for name, key in _COLUMNS.items()}
        except OSError as error:
            raise VlkrError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise VlkrError(f"{path} does not hold predictions: {error}") from error
        return cls(**columns)


def predict(
    logits: Tensor, labels: Tensor, keys: Sequence[str], domains: Sequence[str | None]
) -> Predictions:
    """Returns the predictions of a batch of logits.

    Args:
        logits: ``(batch, num_classes)``; softmax is taken in fp64.
        labels: ``(batch)``, on the same device.
        keys: keys of the samples.
        domains: domains of the samples.

    Raises:
        VlkrError: if a logit is not finite.
    """
    if not logits.isfinite().all():
        raise VlkrError("logits are not finite")
    labels = labels[:, None]
    log_probabilities = logits.double().log_softmax(1)
    confidence, predicted = log_probabilities.max(1)
    top5 = log_probabilities.topk(min(5, logits.shape[1])).indices
    nll = -log_probabilities.gather(1, labels)[:, 0]
    return Predictions(
        list(keys),
        labels[:, 0].tolist(),
        predicted.tolist(),
        _rounded(confidence.exp()),
        (top5 == labels).any(1).tolist(),
        _rounded(nll),
        list(domains),
    )


def _rounded(values: Tensor) -> list[float]:
    """Rounds to 12 decimals, because fp64's last digits depend on the batch."""
    rounded: list[float] = (values.round(decimals=12) + 0.0).tolist()  # and no negative zero
    return rounded
