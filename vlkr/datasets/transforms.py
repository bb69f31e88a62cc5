"""From an image to the tensor that a model wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

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
        return _normalized(images, self.mean, self.std)


@dataclass(frozen=True)
class PixelTransform:
    """A model's own transform up to 8-bit pixels; normalisation is left to the batch.

    Attributes:
        head: PIL image to PIL image of mode RGB and the model's size.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
    """

    head: transforms.Compose
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels ``(3, height, width)`` in uint8."""
        return to_tensor(self.head(image))

    def normalize(self, images: Tensor) -> Tensor:
        """``(batch, 3, height, width)`` in uint8 as the model's own transform has it, to the bit.

        Float images, of a transform that is not split, are left as they are.
        """
        return _normalized(images, self.mean, self.std)


def without_normalization(transform: Transform) -> Transform | PixelTransform:
    """A transform that ends in ``ToTensor`` and ``Normalize``, as open_clip's and timm's, split.

    Workers then hand over a quarter of the bytes, and normalising is one operation for a batch, on
    the model's device. Other transforms are left as they are.
    """
    steps = transform.transforms if isinstance(transform, transforms.Compose) else []
    if len(steps) < 2 or not (
        isinstance(steps[-2], transforms.ToTensor) and isinstance(steps[-1], transforms.Normalize)
    ):
        return transform
    mean, std = (torch.as_tensor(values).tolist() for values in (steps[-1].mean, steps[-1].std))
    return PixelTransform(transforms.Compose(steps[:-2]), mean, std)


def _normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if images.dtype != torch.uint8:
        return images
    # Two passes: converting and laying out anew in one is several times as slow.
    scaled = images.float().contiguous().div_(255)
    normalized: Tensor = v2.functional.normalize(scaled, list(mean), list(std), inplace=True)
    return normalized


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
