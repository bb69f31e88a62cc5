"""Decoding images that nobody vouches for."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlkr.datasets.samples import BadSample, Sample

MAX_PIXELS = 2**26
"""An image with more pixels (8192x8192) is refused before it is decoded."""

# Pillow's names of what the sources read: no other of its decoders is ever started.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_CONVERTED = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBX")


def decode_image(sample: Sample) -> Image.Image | BadSample:
    """Decodes to RGB with 8 bits a channel, upright.

    EXIF's orientation is applied, and passed over where EXIF is damaged. Transparency (an alpha
    channel, or a colour or palette entry that is transparent) is laid over white. 16-bit gray is
    scaled to 8 bits. Palettes, gray, 1-bit, CMYK and YCbCr are converted by Pillow. Of an
    animation the first frame counts.

    Returns:
        A bad sample for another format than JPEG, PNG, WebP, BMP, GIF, TIFF or PPM; truncated or
        corrupt data; more than ``MAX_PIXELS`` pixels; pixels whose range is not known (floating
        point, 32-bit integers) or that are not colors (LAB, HSV).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow can do without is no bad sample
            with Image.open(io.BytesIO(sample.image), formats=_FORMATS) as image:
                return _rgb(image)
    except UnidentifiedImageError:
        reason = "is no image in a format that is known"
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
    # Of TIFF, whose orientation is no EXIF, Pillow has taken care.
    if "exif" in image.info or "Raw profile type exif" in image.info:
        image = _upright(image)
    if is_16_bits:
        return _from_16_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    if image.mode not in _CONVERTED:
        raise _RefusedError(f"has pixels of mode {image.mode}, expected gray or colours")
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
