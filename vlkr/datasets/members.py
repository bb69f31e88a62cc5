"""The files that a sample is in a tar."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import replace

from PIL import Image

from vlkr.datasets.images import decode_image
from vlkr.datasets.samples import BadSample, Sample

# A key that is a tar member's name as it stands: webdataset cuts names at the first dot.
_SAFE_KEY = re.compile(r"[\w-]+(?:/[\w-]+)*", re.ASCII)
_MAX_KEY = 80
_MAGIC = {
    "jpg": rb"\xff\xd8\xff",
    "png": rb"\x89PNG\r\n\x1a\n",
    "webp": rb"RIFF....WEBP",
    "bmp": rb"BM",
    "gif": rb"GIF8",
    "tif": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "ppm": rb"P[1-6]",
}
_LOSSLESS = ("png", "bmp", "gif", "ppm")


def image_extension(image: bytes) -> str | None:
    """Of encoded bytes, told by how they begin; None for a format that is not known."""
    return next((e for e, magic in _MAGIC.items() if re.match(magic, image, re.DOTALL)), None)


def check_format(sample: Sample) -> str | BadSample:
    """The image's file extension, if its format is known."""
    return image_extension(sample.image) or sample.bad("is no image in a format that is known")


def tar_fields(sample: Sample) -> list[tuple[str, bytes]] | BadSample:
    """Names and contents of a sample's files in a tar.

    A key that webdataset would cut at a dot goes into ``.json``, and a hash of it into the name.
    """
    extension = check_format(sample)
    if isinstance(extension, BadSample):
        return extension
    is_safe = len(sample.key) <= _MAX_KEY and _SAFE_KEY.fullmatch(sample.key)
    name = sample.key if is_safe else "s" + hashlib.sha256(sample.key.encode()).hexdigest()[:20]
    about = {} if is_safe else {"key": sample.key}
    about |= {} if sample.domain is None else {"domain": sample.domain}
    fields = [(f"{name}.{extension}", sample.image), (f"{name}.cls", str(sample.label).encode())]
    return fields + ([(f"{name}.json", json.dumps(about).encode())] if about else [])


def shrunk(sample: Sample, size: int | None) -> Sample | BadSample:
    """The sample with its image's shorter side at most ``size`` pixels.

    PNG, BMP, GIF and PPM stay lossless, as PNG; what else is shrunk becomes a JPEG of quality 95.
    """
    if size is None:
        return sample
    image = decode_image(sample)
    if isinstance(image, BadSample):
        return image
    short = min(image.size)
    if short <= size:
        return sample
    width, height = (max(size, round(side * size / short)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    if image_extension(sample.image) in _LOSSLESS:
        image.save(buffer, "png")
    else:
        image.save(buffer, "jpeg", quality=95, subsampling=0)
    return replace(sample, image=buffer.getvalue())
