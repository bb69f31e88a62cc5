"""How an image becomes pixels, in the words of each library."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import transforms

from vlkr.errors import VlkrError
from vlkr.models.clip import ClipBundle, evaluation_transform, image_size

_TIMM_CROP_MODES = {"shortest": "center", "squash": "squash"}
_PIL_RESAMPLING = {"bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class Preprocessing:
    """Settings of the evaluation transform.

    Attributes:
        size: height and width in pixels.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize_mode: ``"shortest"`` (shortest edge, then a centre crop), ``"squash"`` or
            ``"longest"`` (longest edge, then padding).
        fill_color: of the padding.
        crop_pct: the crop's part of the resized image; 1 but for timm's models.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    fill_color: int = 0
    crop_pct: float = 1.0

    @classmethod
    def of(cls, bundle: ClipBundle) -> Preprocessing:
        """Those of a model.

        Raises:
            VlkrError: for a way to resize that cannot be told to others.
        """
        cfg = bundle.preprocess_cfg
        # "random" is drawn in training alone; open_clip and timm evaluate with bicubic then.
        random = cfg["interpolation"] == "random"
        found = cls(
            size=image_size(bundle),
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            interpolation="bicubic" if random else cfg["interpolation"],
            resize_mode=cfg["resize_mode"],
            fill_color=cfg.get("fill_color", 0),
            crop_pct=cfg.get("crop_pct", 1.0),
        )
        height, width = found.size
        whole = found.resize_mode == "longest" or (
            found.resize_mode == "shortest" and height != width
        )
        if (whole and found.crop_pct != 1) or found.interpolation not in _PIL_RESAMPLING:
            raise VlkrError(
                f"model {bundle.name!r} resizes its images in a way that no format has words for: "
                f"{found.interpolation}, {found.resize_mode}, crop_pct {found.crop_pct}"
            )
        return found

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocessing:
        """From what :meth:`to_json` gave."""
        return cls(**(value | {key: tuple(value[key]) for key in ("size", "mean", "std")}))

    def to_json(self) -> dict[str, Any]:
        """As a dict."""
        return asdict(self)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The transform itself, PIL image to ``(3, height, width)``."""
        if self.crop_pct == 1:
            cfg = self.to_json()
            del cfg["crop_pct"]
            return evaluation_transform(cfg)
        mode = transforms.InterpolationMode(self.interpolation)
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        size = height if self.resize_mode == "shortest" else (height, width)
        steps = [
            transforms.Resize(size, interpolation=mode),
            transforms.CenterCrop(self.size),
            transforms.ToTensor(),
            transforms.Normalize(self.mean, self.std),
        ]
        composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
        return composed

    def timm(self) -> dict[str, Any]:
        """As entries of timm's ``pretrained_cfg``.

        Raises:
            VlkrError: if it has no words for them.
        """
        if self.resize_mode not in _TIMM_CROP_MODES:
            raise VlkrError(f"timm has no resize mode {self.resize_mode!r}; choose another format")
        return {
            "input_size": [3, *self.size],
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": _TIMM_CROP_MODES[self.resize_mode],
        }

    def transformers(self) -> dict[str, Any]:
        """As arguments of transformers' ``CLIPImageProcessor``.

        Raises:
            VlkrError: if it has no words for them.
        """
        height, width = self.size
        shortest = self.resize_mode == "shortest"
        if self.resize_mode == "longest" or (shortest and height != width):
            raise VlkrError(
                f"transformers' CLIPImageProcessor has no resize mode {self.resize_mode!r} to "
                f"{height}x{width} pixels; choose another format"
            )
        both = {"height": height, "width": width}
        return {
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": height} if shortest else both,
            "resample": _PIL_RESAMPLING[self.interpolation],
            "do_center_crop": shortest,
            "crop_size": both,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
