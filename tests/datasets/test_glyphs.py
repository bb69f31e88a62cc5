import sys

import numpy as np
from helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from glyphs import HELD_OUT_FONTS, TRAINING_FONTS, font_path, render_mask, render_pool, warp

sys.path.pop(0)

FONTS = TRAINING_FONTS + HELD_OUT_FONTS
FAMILIES = [
    "DejaVuSans",
    "DejaVuSerif",
    "STIXGeneral",
    "cmb",
    "cmmi",
    "cmr",
    "cmss",
    "cmti",
    "cmtt",
]


def families(fonts):
    return {family for font in fonts for family in FAMILIES if font.startswith(family)}


def test_held_out_fonts_are_disjoint_from_training_fonts():
    assert not families(TRAINING_FONTS) & families(HELD_OUT_FONTS)
    assert families(FONTS) == set(FAMILIES)
    assert len({font_path(font).read_bytes() for font in FONTS}) == len(FONTS)


def test_every_font_draws_every_character_unlike_the_others():
    for font in FONTS:
        masks, labels = render_pool([font], size=32, strokes=(0,))
        assert (masks.shape, masks.dtype) == ((62, 32, 32), np.uint8)
        assert labels.tolist() == list(range(62))
        assert masks.reshape(62, -1).max(1).min() > 127
        assert len({mask.tobytes() for mask in masks}) == 62


def test_warp_by_identity_shift_and_quarter_turn():
    identity = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    mask = render_mask("F", "DejaVuSerif", size=32)
    np.testing.assert_array_equal(warp(mask, identity), mask)
    shift = identity + np.array([[0, 0, 2 * 4 / 32], [0, 0, 0]])
    np.testing.assert_array_equal(warp(mask, shift)[:, :28], mask[:, 4:])
    turned = warp(mask, np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]))
    assert any(np.array_equal(turned, np.rot90(mask, quarters)) for quarters in (1, 3))
