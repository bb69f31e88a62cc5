"""Rendered characters: digits and Latin letters in the fonts that matplotlib ships.

A glyph is a mask ``(size, size)`` of ink coverage, 0 (background) to 255 (ink). Masks are warped by
small affine maps and painted with an ink and a background color. All randomness comes from the
`numpy.random.Generator` that the caller passes.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CHARACTERS: str = string.digits + string.ascii_uppercase + string.ascii_lowercase

TRAINING_FONTS: tuple[str, ...] = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "cmb10",
    "cmmi10",
    "cmr10",
    "cmti10",
)
HELD_OUT_FONTS: tuple[str, ...] = (
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmss10",
    "cmtt10",
)

COLORS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "red": (220, 30, 30),
    "green": (30, 150, 40),
    "blue": (35, 60, 220),
    "yellow": (245, 220, 40),
    "orange": (245, 140, 20),
    "purple": (125, 40, 160),
    "pink": (250, 150, 195),
    "brown": (115, 65, 25),
    "cyan": (60, 215, 230),
}

_CAP_HEIGHT = 0.66
_LUMA = np.array([0.299, 0.587, 0.114])


def font_path(font: str) -> Path:
    """Path of the TrueType file that matplotlib ships under this name.

    Raises:
        FileNotFoundError: matplotlib ships no such font.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not path.is_file():
        raise FileNotFoundError(f"matplotlib ships no font {font!r} ({path})")
    return path


def render_mask(character: str, font: str, *, size: int = 64, stroke: int = 0) -> NDArray[np.uint8]:
    """Draws one character, its bounding box centerd, all characters of a font at one scale.

    Args:
        character: One of `CHARACTERS`.
        font: One of `TRAINING_FONTS` or `HELD_OUT_FONTS`.
        size: Side of the square in pixels; a capital H takes about two thirds of it.
        stroke: Pixels by which the outline is thickened.

    Returns:
        Ink coverage ``(size, size)``, 0 to 255.
    """
    path = str(font_path(font))
    reference = ImageFont.truetype(path, 100, layout_engine=ImageFont.Layout.BASIC)
    _, top, _, bottom = reference.getbbox("H")
    points = round(100 * _CAP_HEIGHT * size / (bottom - top))
    face = ImageFont.truetype(path, points, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(character, stroke_width=stroke)
    canvas = Image.new("L", (size, size), 0)
    corner = ((size - left - right) / 2, (size - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=face, stroke_width=stroke)
    return np.asarray(canvas)


def render_pool(
    fonts: Sequence[str],
    characters: str = CHARACTERS,
    *,
    size: int = 64,
    strokes: Sequence[int] = (0, 1, 2, 3),
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws every character in every font at every stroke width.

    Returns:
        Masks ``(num_masks, size, size)`` and labels ``(num_masks,)``, indices into `characters`.
    """
    masks = [
        render_mask(character, font, size=size, stroke=stroke)
        for character in characters
        for font in fonts
        for stroke in strokes
    ]
    labels = np.repeat(np.arange(len(characters)), len(fonts) * len(strokes))
    return np.stack(masks), labels.astype(np.int64)


def random_affines(
    count: int,
    rng: np.random.Generator,
    *,
    degrees: float = 10.0,
    shear: float = 0.15,
    scale: tuple[float, float] = (0.9, 1.2),
    stretch: float = 0.1,
    shift: float = 0.06,
) -> NDArray[np.float64]:
    """Draws affine maps from output to input positions, both axes running from -1 to 1.

    Args:
        count: How many maps.
        rng: Source of randomness.
        degrees: Largest rotation either way.
        shear: Largest horizontal shear either way.
        scale: Smallest and largest magnification of the glyph.
        stretch: Largest relative change of width against height.
        shift: Largest move either way, as a fraction of the side.

    Returns:
        Matrices ``(count, 2, 3)``, as `torch.nn.functional.affine_grid` takes them.
    """
    angle = np.deg2rad(rng.uniform(-degrees, degrees, count))
    slant = rng.uniform(-shear, shear, count)
    zoom = rng.uniform(*scale, count)
    ratio = 1 + rng.uniform(-stretch, stretch, count)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    shape = np.zeros((count, 2, 2))
    shape[:, 0, 0] = 1 / (zoom * ratio)
    shape[:, 0, 1] = slant / zoom
    shape[:, 1, 1] = ratio / zoom
    move = 2 * rng.uniform(-shift, shift, (count, 2, 1))
    return np.concatenate([shape @ rotation, move], axis=2)


def warp(mask: NDArray[np.uint8], matrix: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Applies one of `random_affines` to a mask ``(size, size)``; outside it there is no ink."""
    size = mask.shape[0]
    linear, move = matrix[:, :2], matrix[:, 2]
    center = np.full(2, size / 2)
    offset = center + move * size / 2 - linear @ center
    coefficients = np.concatenate([linear, offset[:, None]], axis=1).ravel().tolist()
    image = Image.fromarray(mask).transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    return np.asarray(image)


def render_glyph(
    character: str, font: str, rng: np.random.Generator, *, size: int = 32
) -> NDArray[np.uint8]:
    """Draws one character with a random stroke width and a small random affine change.

    Returns:
        Ink coverage ``(size, size)``, 0 to 255.
    """
    mask = render_mask(character, font, stroke=int(rng.integers(0, 3)))
    warped = warp(mask, random_affines(1, rng)[0])
    return np.asarray(Image.fromarray(warped).resize((size, size), Image.Resampling.BOX))


def color_pairs(min_contrast: float = 0.25) -> list[tuple[str, str]]:
    """Names (ink, background) of all pairs in `COLORS` that are told apart with ease.

    Args:
        min_contrast: Smallest difference in luma, as a fraction of white's.
    """
    luma = {name: float(_LUMA @ np.array(rgb)) / 255 for name, rgb in COLORS.items()}
    return [
        (ink, background)
        for ink in COLORS
        for background in COLORS
        if abs(luma[ink] - luma[background]) >= min_contrast
    ]


def paint(
    mask: NDArray[np.uint8], ink: Sequence[float], background: Sequence[float]
) -> NDArray[np.uint8]:
    """Blends two RGB colors by ink coverage.

    Args:
        mask: Ink coverage ``(...)``, 0 to 255.
        ink: RGB, 0 to 255.
        background: RGB, 0 to 255.

    Returns:
        Colors ``(..., 3)``.
    """
    coverage = mask[..., None] / 255
    blend = coverage * np.asarray(ink) + (1 - coverage) * np.asarray(background)
    colors: NDArray[np.uint8] = np.rint(blend).astype(np.uint8)
    return colors
