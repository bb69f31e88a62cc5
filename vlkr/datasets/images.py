"""Decode, recognize and shrink untrusted image files."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlkr.datasets.samples import BadSample, Sample

MAX_PIXELS = 2**26
"""An image with more pixels (8192x8192) is refused before it is decoded."""

# Pillow's names of what the sources read: no other of its decoders is ever started.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_CONVERTED = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBX")
_UNKNOWN = "is not an image in a known format"
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


def decode_image(sample: Sample) -> Image.Image | BadSample:
    """Decodes an image to upright RGB with 8 bits per channel.

    EXIF's orientation is applied, and ignored where EXIF is damaged. Transparency (an alpha
    channel, or a transparent color or palette entry) is composited over white. 16-bit gray is
    scaled to 8 bits. Palettes, gray, 1-bit, CMYK and YCbCr are converted by Pillow. The first frame
    of an animation is used.

    Returns:
        A bad sample for another format than JPEG, PNG, WebP, BMP, GIF, TIFF or PPM; truncated or
        corrupt data; more than ``MAX_PIXELS`` pixels; pixels whose range is not known (floating
        point, 32-bit integers) or that are not colors (LAB, HSV).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an image that Pillow warns of is still good
            with Image.open(io.BytesIO(sample.image), formats=_FORMATS) as image:
                return _rgb(image)
    except UnidentifiedImageError:
        reason = _UNKNOWN
    except Image.DecompressionBombError:
        reason = f"has more than the {MAX_PIXELS:,} pixels allowed"
    except _RefusedError as error:
        reason = str(error)
    # Pillow's plugins raise whatever their parsers stumble over: struct.error, KeyError, ...
    except Exception as error:
        reason = f"is a corrupt image: {error or type(error).__name__}"
    return sample.bad(reason)


class _RefusedError(Exception):
    """A whole image that is not wanted."""


def _rgb(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _RefusedError(f"has {width}x{height} pixels, more than the {MAX_PIXELS:,} allowed")
    image.load()
    is_16_bits = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    # Pillow has applied the orientation of TIFF, which is not EXIF.
    if "exif" in image.info or "Raw profile type exif" in image.info:
        image = _upright(image)
    if is_16_bits:
        return _from_16_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    if image.mode not in _CONVERTED:
        raise _RefusedError(f"has pixels of mode {image.mode}, expected gray or colors")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as in decode_image
        return image


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    gray = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        gray[values == clear] = 255
    return Image.fromarray(gray).convert("RGB")


def image_extension(image: bytes) -> str | None:
    """Of encoded bytes, told by how they begin; None for a format that is not known."""
    return next((e for e, magic in _MAGIC.items() if re.match(magic, image, re.DOTALL)), None)


def check_format(sample: Sample) -> str | BadSample:
    """The image's file extension, if its format is known."""
    return image_extension(sample.image) or sample.bad(_UNKNOWN)


def shrink(sample: Sample, size: int | None) -> Sample | BadSample:
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
