"""Sources in memory whose images are quick to decode, for tests of streams."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from PIL import Image

from vlkr.datasets import BadSample, Sample
from vlkr.errors import VlkrError


@cache
def tiny_image(number: int, pad: int = 0) -> bytes:
    """A PNG of 4x4 pixels whose first pixel tells the number; bytes behind its end do no harm."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0] = number % 256, number // 256, 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue() + bytes(pad)


def tiny_samples(count: int, pad: int = 0) -> list[Sample]:
    """Samples of two classes with the keys ``k0``, ``k1``, ..."""
    return [Sample(f"k{i}", tiny_image(i, pad), i % 2) for i in range(count)]


@dataclass
class Listed:
    """A source of given samples by shard; an error among them is raised in its place."""

    parts: list[list[Sample | BadSample | VlkrError]]

    def __iter__(self):
        for part in self.parts:
            for sample in part:
                if isinstance(sample, VlkrError):
                    raise sample
                yield sample

    def shards(self):
        return [Listed([part]) for part in self.parts]


def dealt(samples, shards: int) -> Listed:
    """Samples in consecutive shards of different sizes."""
    bounds = sorted(round(len(samples) * (i / shards) ** 1.5) for i in range(shards + 1))
    return Listed([samples[a:b] for a, b in pairwise(bounds)])
