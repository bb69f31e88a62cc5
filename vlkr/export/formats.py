"""What all export formats share: the model they are given, the manifest, and the registry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from vlkr.errors import VlkrError
from vlkr.models.clip import ClipBundle, evaluation_transform, image_size
from vlkr.runs import RunConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

FORMATS = {
    "open_clip": "vlkr.export.open_clip:OpenClipFormat",
    "timm": "vlkr.export.timm:TimmFormat",
    "transformers": "vlkr.export.transformers:TransformersFormat",
    "onnx": "vlkr.export.onnx:OnnxFormat",
    "torch": "vlkr.export.torch:TorchFormat",
    "adapter": "vlkr.export.adapter:AdapterFormat",
}

_TIMM_CROP_MODES = {"shortest": "center", "squash": "squash"}
_PIL_RESAMPLING = {"bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class Preprocessing:
    """Settings of the evaluation transform.

    Attributes:
        size: height and width in pixels.
        mean: mean per channel of pixels in [0, 1].
        std: standard deviation per channel of pixels in [0, 1].
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize_mode: ``"shortest"`` (shortest edge, then a center crop), ``"squash"`` or
            ``"longest"`` (longest edge, then padding).
        fill_color: gray level of the padding.
        crop_pct: size of the crop relative to the resized image; 1 except for timm's models.
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
        """Returns the settings of a model; an error for those that no format can express."""
        keys = ("mean", "std", "interpolation", "resize_mode", "fill_color", "crop_pct")
        cfg = {key: bundle.preprocess_cfg[key] for key in keys if key in bundle.preprocess_cfg}
        # "random" is drawn in training only; open_clip and timm then evaluate with bicubic.
        if cfg["interpolation"] == "random":
            cfg["interpolation"] = "bicubic"
        settings = cls.from_json(cfg | {"size": image_size(bundle)})
        height, width = settings.size
        is_uncropped = settings.resize_mode == "longest" or (
            settings.resize_mode == "shortest" and height != width
        )
        if (is_uncropped and settings.crop_pct != 1) or (
            settings.interpolation not in _PIL_RESAMPLING
        ):
            raise VlkrError(
                f"unsupported resize settings for export of model {bundle.name!r}: "
                f"{settings.interpolation}, {settings.resize_mode}, crop_pct {settings.crop_pct}"
            )
        return settings

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocessing:
        """Rebuilds the settings from :meth:`to_json`."""
        return cls(**(value | {key: tuple(value[key]) for key in ("size", "mean", "std")}))

    def to_json(self) -> dict[str, Any]:
        """Returns all settings by name."""
        return asdict(self)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Returns the transform itself, PIL image to ``(3, height, width)``."""
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
        """Returns the settings as entries of timm's ``pretrained_cfg``, if it can express them."""
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
        """Returns the settings as arguments of transformers' ``CLIPImageProcessor``."""
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


@dataclass(frozen=True)
class Classifier:
    """Class embeddings and what they were made from.

    Attributes:
        class_names: class names in the order of the labels.
        templates: prompts with the placeholder ``{c}``.
        class_embeddings: ``(num_classes, embed_dim)``, unit norm, fp32.
        logit_scale: factor of the cosine similarities.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    class_embeddings: Tensor
    logit_scale: float

    def logits(self, image_features: Tensor) -> Tensor:
        """Maps ``(batch, embed_dim)``, unit norm, to ``(batch, num_classes)``."""
        return self.logit_scale * image_features @ self.class_embeddings.T


@dataclass(frozen=True)
class ExportInput:
    """An adapted model as a format receives it.

    Attributes:
        config: the run's configuration.
        results: the run's metrics, one entry per dataset; empty if it was not evaluated.
        adapted: the model with its adapters injected, at the scale that is exported.
        merged: a copy with the adapters merged in fp32: the base model's classes and state-dict
            keys.
        preprocessing: settings of the evaluation transform.
        classifier: class embeddings of the run's classes.
        alpha: scale of the adapters; 1 as trained, 0 for the base model.
    """

    config: RunConfig
    results: list[dict[str, Any]]
    adapted: ClipBundle
    merged: nn.Module
    preprocessing: Preprocessing
    classifier: Classifier
    alpha: float


@dataclass(frozen=True)
class Manifest:
    """The contents of ``vlkr_export.json``.

    Attributes:
        format: a key of ``FORMATS``.
        dtype: dtype of the weights, a key of ``DTYPES``.
        alpha: scale of the adapters.
        vlkr_version: version of vlkr that wrote the export.
        base_model: name of the base model.
        base_pretrained: tag of the base model, or path of its weights.
        base_sha256: hash of the base model's weights.
        weights_sha256: hash of the merged weights in fp32.
        adapter: name and options.
        data: name, the options that select the training images, and the seed.
        class_names: class names in the order of the labels.
        templates: prompts with the placeholder ``{c}``.
        preprocessing: fields of :class:`Preprocessing`.
        parity: fields of :class:`vlkr.export.parity.Parity`; None while the export is written.
    """

    format: str
    dtype: str
    alpha: float
    vlkr_version: str
    base_model: str
    base_pretrained: str | None
    base_sha256: str
    weights_sha256: str
    adapter: dict[str, Any]
    data: dict[str, Any]
    class_names: list[str]
    templates: list[str]
    preprocessing: dict[str, Any]
    parity: dict[str, Any] | None = None


class Exported(ABC):
    """An exported model, loaded from its folder by the library its format is made for.

    Attributes:
        folder: path of the export.
        manifest: contents of its ``vlkr_export.json``.
        classifier: class embeddings on ``device``.
        device: device that computes.
        preprocess: maps an RGB image to ``(3, height, width)`` by the format's own settings.
    """

    preprocess: Callable[[Image.Image], Tensor]

    def __init__(
        self, folder: Path, manifest: Manifest, classifier: Classifier, device: torch.device
    ) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        moved = classifier.class_embeddings.to(device)
        self.classifier = replace(classifier, class_embeddings=moved)
        self._load()

    @abstractmethod
    def _load(self) -> None:
        """Reads the model and ``preprocess`` from ``folder``."""

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """Maps ``(batch, 3, height, width)`` to unit norm ``(batch, embed_dim)``, fp32."""

    def text_features(self, texts: Sequence[str], tokens: Tensor) -> Tensor | None:
        """Returns unit norm ``(num_texts, embed_dim)``, fp32; None without a text encoder.

        Args:
            texts: for a format with its own tokenizer.
            tokens: the same texts by the base model's tokenizer, for a format without one.
        """
        return None

    def logits(self, pixels: Tensor) -> Tensor:
        """Maps ``(batch, 3, height, width)`` to ``(batch, num_classes)``, fp32."""
        return self.classifier.logits(self.image_features(pixels))


class Format(ABC):
    """A way to write an adapted model; the constructor refuses a model that it cannot hold.

    Attributes:
        library: the library that loads the export, as model hubs spell it.
        snippet: the lines that load it, with ``{folder}`` for its path.
        exported: the class of the loaded export.
    """

    library: str
    snippet: str
    exported: ClassVar[type[Exported]]

    def __init__(self, source: ExportInput) -> None:
        self.source = source

    @abstractmethod
    def contents(self) -> str:
        """Returns a paragraph of Markdown about the files."""

    @abstractmethod
    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes weights and preprocessing into an existing folder."""


def get_format(name: str) -> type[Format]:
    """Returns a format by its name; an error if its library is not installed."""
    if name not in FORMATS:
        raise VlkrError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    with named_if_missing(f"format {name}"):
        return cast(type[Format], resolve_name(FORMATS[name]))


@contextmanager
def named_if_missing(user: str) -> Iterator[None]:
    """Raises :class:`VlkrError` for a library that ``user`` needs and that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise VlkrError(
            f"{user} needs {error.name}, which is not installed: pip install 'vlkr[export]'"
        ) from error


def require_text(source: ExportInput, format_name: str) -> None:
    """Raises :class:`VlkrError` for a model without a text tower."""
    if not source.adapted.has_text:
        raise VlkrError(
            f"model {source.adapted.name!r} has no text tower, and format {format_name} holds "
            "image-text models; choose timm, onnx, torch or adapter"
        )


def cast_tensors(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Casts merged weights once; scalars and integers keep their dtype."""
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() and tensor.numel() > 1 else tensor
        for key, tensor in tensors.items()
    }


def unit_norm(features: Tensor) -> Tensor:
    """Returns features in fp32 with norm 1."""
    return F.normalize(features.float(), dim=-1)
