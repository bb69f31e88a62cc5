import io
import re
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from helpers import color_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vlkr.datasets import BadSample, Sample, images
from vlkr.datasets.images import decode_image


def encode(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data):
    image = decode_image(Sample("k", data, 0, shard="d/0.tar"))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refused(data):
    bad = decode_image(Sample("k", data, 0, shard="d/0.tar"))
    assert isinstance(bad, BadSample)
    return bad


def pattern(height=6, width=4):
    """A picture without symmetry; every transposition of it differs."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    # LZW keeps Pillow from writing YCbCr as JPEG; black and white survive every mode.
    pixels = np.zeros((5, 4, 3), np.uint8)
    pixels[0] = 255
    data = encode(Image.fromarray(pixels).convert(mode), "tiff", compression="tiff_lzw")
    np.testing.assert_allclose(decode(data), pixels, atol=1)


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "gif", "tiff", "ppm"])
def test_every_format_is_read(kind):
    gray = np.arange(24, dtype=np.uint8).reshape(6, 4) * 10
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    data = encode(Image.fromarray(gray), kind, **options)
    np.testing.assert_array_equal(decode(data), np.repeat(gray[..., None], 3, -1))


def test_jpeg_is_decoded_as_pillow_does():
    data = encode(Image.fromarray(pattern(40, 30)), "jpeg", quality=90)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_adobe_cmyk_jpeg_is_not_inverted():
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert decode(encode(white, "jpeg")).min() > 250


@pytest.mark.parametrize("alpha", [0, 51, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode, alpha):
    gray = 100
    fill = (gray, alpha) if mode == "LA" else (gray, gray, gray, alpha)
    expected = gray * alpha / 255 + 255 * (1 - alpha / 255)
    np.testing.assert_allclose(decode(encode(Image.new(mode, (3, 2), fill))), expected, atol=1)


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for kind in ("png", "gif"):
        pixels = decode(encode(image, kind, transparency=0))
        assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_transparent_color_is_white():
    gray = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert decode(encode(gray, transparency=7)).tolist() == [[[255] * 3, [9] * 3]]


def test_16_bits_are_scaled():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    for kind in ("png", "tiff", "ppm"):
        pixels = decode(encode(Image.fromarray(values), kind))
        np.testing.assert_allclose(pixels[..., 0], values / 257, atol=0.51, err_msg=kind)
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_transparent_16_bit_gray_is_white():
    chunk = b"tRNS" + struct.pack(">H", 256)
    data = encode(Image.fromarray(np.array([[256, 512]], np.uint16)))
    at = data.index(b"IDAT") - 4
    crc = struct.pack(">I", zlib.crc32(chunk))
    data = data[:at] + struct.pack(">I", 2) + chunk + crc + data[at:]
    assert decode(data)[..., 0].tolist() == [[255, 2]]


# By EXIF's definition: what the first row and the first column of the stored image are.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    data = encode(Image.fromarray(pattern()), kind, exif=exif, **options)
    np.testing.assert_array_equal(decode(data), UPRIGHT[orientation](pattern()))


@pytest.mark.parametrize("value", [0, 9, 77])
def test_orientation_that_does_not_exist_is_passed_over(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert decode(encode(Image.fromarray(pattern()), exif=exif)).shape == (6, 4, 3)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"garbage" * 9])
def test_damaged_exif_is_passed_over(exif):
    data = encode(Image.fromarray(pattern(8, 16)), "jpeg", exif=exif)
    assert decode(data).shape == (8, 16, 3)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_first_frame_of_an_animation_counts(kind):
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (200, 90, 10)]
    options = {"lossless": True} if kind == "webp" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_allclose(decode(data), 200, atol=2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not an image in a known format"),
        (b"garbage", "is not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image in a known"),
        (b"\x80\x04cos\nabort\n(tR.", "is not an image in a known format"),
        (color_image("red", 0)[:200], "is a corrupt image: .*truncated"),
        (encode(Image.fromarray(pattern(64, 64)), "jpeg")[:-300], "is a corrupt image: .*trunc"),
        (color_image("red", 0)[:60], "is a corrupt image: "),
        (encode(Image.new("F", (2, 2)), "tiff"), "has pixels of mode F, expected gray or colors"),
        (encode(Image.new("I", (2, 2)), "tiff"), "has pixels of mode I, expected gray or colors"),
        (encode(Image.new("LAB", (2, 2)), "tiff"), "has pixels of mode LAB, expected gray or"),
    ],
)
def test_refused_images_are_told_by_shard_and_key(data, reason):
    bad = refused(data)
    assert re.match(rf"d/0\.tar, sample 'k' {reason}", str(bad))
    assert (bad.shard, bad.key) == ("d/0.tar", "k")


def bomb(width, height):
    """A PNG of so many pixels in a few bytes: a header without what belongs to it."""
    data = bytearray(encode(Image.new("L", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((8193, 8192), r"'k' has 8193x8192 pixels, more than the 67,108,864 allowed"),
        ((50_000, 50_000), "'k' has more than the 67,108,864 pixels allowed"),
    ],
)
def test_bombs_are_refused_before_they_are_decoded(size, reason, monkeypatch):
    data = bomb(*size)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert re.search(reason, str(refused(data)))


def test_as_many_pixels_as_allowed(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 24)
    assert decode(encode(Image.fromarray(pattern()))).shape == (6, 4, 3)
    bad = refused(encode(Image.fromarray(pattern(6, 5))))
    assert bad.reason == "has 5x6 pixels, more than the 24 allowed"


SEEDS = [
    encode(Image.fromarray(pattern(16, 16)), kind, **options)
    for kind, options in (
        ("png", {}),
        ("jpeg", {}),
        ("webp", {}),
        ("gif", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("bmp", {}),
        ("ppm", {}),
    )
]


@pytest.mark.filterwarnings("ignore")
def test_damage_is_refused_or_an_image():
    outcomes = Counter()

    @settings(max_examples=300, deadline=None)
    @given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255))))
    def check(data, changes):
        damaged = bytearray(data)
        for position, value in changes:
            damaged[position % len(damaged)] = value
        image = decode_image(Sample("k", bytes(damaged), 0))
        outcomes[type(image)] += 1
        if not isinstance(image, BadSample):
            assert image.mode == "RGB"
            with Image.open(io.BytesIO(damaged)) as again:
                assert sorted(image.size) == sorted(again.size)  # or upright

    check()
    assert outcomes[Image.Image] > 0.05 * outcomes.total()
