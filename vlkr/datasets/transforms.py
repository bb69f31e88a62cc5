"""From an image to the tensor that a model wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip if asked, and the model's own normalisation.

    Cropping works on 8-bit tensors, where torchvision resizes several times as fast as Pillow;
    normalisation is left to the batch, on whichever device it lies.

    Attributes:
        size: height and width in pixels.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
        interpolation: ``"bicubic"``, ``"bilinear"``, ... as open_clip names it.
        crop_scale: smallest and largest area of the crop, relative to the image.
        flip: flip half of the images horizontally.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_scale: tuple[float, float]
    flip: bool

    @cached_property
    def _augment(self) -> v2.Compose:
        name = "bicubic" if self.interpolation == "random" else self.interpolation
        mode = v2.InterpolationMode(name)
        crop = v2.RandomResizedCrop(
            self.size, scale=self.crop_scale, interpolation=mode, antialias=True
        )
        return v2.Compose([crop, v2.RandomHorizontalFlip()] if self.flip else [crop])

    def __call__(self, image: Tensor) -> Tensor:
        """A random crop ``(3, *size)`` of an image ``(3, height, width)``, both uint8."""
        cropped: Tensor = self._augment(image)
        return cropped

    def normalize(self, images: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` in uint8 as the model wants it, in fp32."""
        normalized: Tensor = v2.functional.normalize(
            images.float().div_(255), list(self.mean), list(self.std), inplace=True
        )
        return normalized


@dataclass(frozen=True)
class _LookedUp:
    """A transform that ends in ``ToTensor`` and ``Normalize``, with these two as a table.

    A pixel has 256 values only; the table holds what the two steps make of each, to the bit, and
    looking up takes a third of their time.
    """

    head: transforms.Compose
    table: np.ndarray[Any, np.dtype[np.float32]]

    def __call__(self, image: Image.Image) -> Tensor:
        rgb = self.head(image)
        tensor = torch.empty(3, rgb.height, rgb.width)
        for values, channel, out in zip(self.table, rgb.split(), tensor.numpy(), strict=True):
            np.take(values, np.asarray(channel), out=out, mode="clip")
        return tensor


def with_table(transform: Transform) -> Transform:
    """The same transform, faster where it ends as open_clip's and timm's own do."""
    steps = transform.transforms if isinstance(transform, transforms.Compose) else []
    if len(steps) < 2 or not (
        isinstance(steps[-2], transforms.ToTensor) and isinstance(steps[-1], transforms.Normalize)
    ):
        return transform
    values = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2))
    table = steps[-1](steps[-2](values))[:, 0]
    return _LookedUp(transforms.Compose(steps[:-2]), table.numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """``(3, height, width)`` in uint8, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block torch's CPU generator starts from ``seed``; elsewhere it goes on."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
