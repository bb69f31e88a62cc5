import numpy as np
import pytest

from vlkr.datasets.glyphs import (
    CHARACTERS,
    COLOURS,
    HELD_OUT_FONTS,
    TRAINING_FONTS,
    colour_pairs,
    font_path,
    paint,
    random_affines,
    render_glyph,
    render_mask,
    render_pool,
    warp,
)

FONTS = TRAINING_FONTS + HELD_OUT_FONTS
FAMILIES = (
    "DejaVuSans",
    "DejaVuSerif",
    "STIXGeneral",
    "cmb",
    "cmmi",
    "cmr",
    "cmss",
    "cmti",
    "cmtt",
)
IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def families(fonts):
    return {family for font in fonts for family in FAMILIES if font.startswith(family)}


def test_held_out_fonts_are_disjoint_from_training_fonts():
    assert not set(TRAINING_FONTS) & set(HELD_OUT_FONTS)
    assert not families(TRAINING_FONTS) & families(HELD_OUT_FONTS)
    assert families(FONTS) == set(FAMILIES)
    contents = {font_path(font).read_bytes() for font in FONTS}
    assert len(contents) == len(FONTS)


@pytest.mark.parametrize("font", FONTS)
def test_every_font_draws_every_character_unlike_the_others(font):
    masks, labels = render_pool([font], size=32, strokes=(0,))
    assert masks.shape == (62, 32, 32)
    assert masks.dtype == np.uint8
    assert labels.tolist() == list(range(62))
    assert masks.reshape(62, -1).max(1).min() > 127
    assert len({mask.tobytes() for mask in masks}) == 62


def test_pool_is_ordered_by_character_font_and_stroke():
    masks, labels = render_pool(["cmr10", "cmss10"], "7b", size=32, strokes=(0, 2))
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(masks[6], render_mask("b", "cmss10", size=32))
    np.testing.assert_array_equal(masks[1], render_mask("7", "cmr10", size=32, stroke=2))


def test_mask_is_centred_and_its_capitals_two_thirds_high():
    mask = render_mask("H", "DejaVuSans", size=64)
    rows, columns = (np.flatnonzero(mask.max(axis) > 127) for axis in (1, 0))
    assert rows[-1] - rows[0] + 1 == pytest.approx(64 * 0.66, abs=2)
    assert rows[0] + rows[-1] == pytest.approx(63, abs=2)
    assert columns[0] + columns[-1] == pytest.approx(63, abs=2)


def test_a_stroke_only_adds_ink():
    thin = render_mask("a", "cmr10").astype(int)
    thick = render_mask("a", "cmr10", stroke=2).astype(int)
    assert thick.sum() > 1.3 * thin.sum()


def test_rendering_is_a_function_of_the_seed():
    def draw(seed):
        return render_glyph("q", "cmtt10", np.random.default_rng(seed)).tobytes()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_affines_without_range_are_the_identity():
    matrices = random_affines(
        2, np.random.default_rng(0), degrees=0, shear=0, scale=(1, 1), stretch=0, shift=0
    )
    np.testing.assert_allclose(matrices, np.stack([IDENTITY, IDENTITY]), atol=1e-12)


def test_affines_keep_the_area_that_the_scale_asks_for():
    matrices = random_affines(100, np.random.default_rng(0), scale=(1.25, 1.25))
    np.testing.assert_allclose(np.linalg.det(matrices[:, :, :2]), 1 / 1.25**2)
    assert np.abs(matrices[:, :, 2]).max() <= 2 * 0.06


def test_warp_identity_shift_and_quarter_turn():
    mask = render_mask("F", "DejaVuSerif", size=32)
    np.testing.assert_array_equal(warp(mask, IDENTITY), mask)
    shift = IDENTITY + np.array([[0, 0, 2 * 4 / 32], [0, 0, 0]])
    np.testing.assert_array_equal(warp(mask, shift)[:, :28], mask[:, 4:])
    turn = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    turned = warp(mask, turn)
    assert any(np.array_equal(turned, np.rot90(mask, quarters)) for quarters in (1, 3))


def test_paint_blends_ink_and_background():
    mask = np.array([[0, 255, 51]], dtype=np.uint8)
    painted = paint(mask, (255, 0, 100), (0, 10, 200))
    assert painted.tolist() == [[[0, 10, 200], [255, 0, 100], [51, 8, 180]]]


def test_colour_pairs_differ_in_lightness():
    pairs = colour_pairs()
    assert ("black", "white") in pairs
    assert ("white", "black") in pairs
    assert ("yellow", "white") not in pairs
    assert all(ink != background for ink, background in pairs)
    assert {name for pair in pairs for name in pair} == set(COLOURS)
    assert len(colour_pairs(min_contrast=0.6)) < len(pairs)


def test_unknown_font_is_named():
    with pytest.raises(FileNotFoundError, match="NoSuchFont"):
        font_path("NoSuchFont")


def test_characters_are_digits_then_capitals_then_small_letters():
    assert CHARACTERS == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
