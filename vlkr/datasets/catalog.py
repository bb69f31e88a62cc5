"""Lists the registered datasets."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlkr.datasets.cards import SUITES, Card, card_names, load_card
from vlkr.datasets.registry import local_path
from vlkr.errors import VlkrError
from vlkr.reporting.table import Table

_WIDE = 110  # columns


@dataclass
class CardList:
    """The result of :func:`list_cards`."""

    exit_code = 0

    cards: Sequence[Card]

    def to_json(self) -> dict[str, Any]:
        """Returns what the cards say, and where the data is."""
        return {
            card.name: {
                "title": card.title,
                "classes": _num_classes(card),
                "images": dict(card.splits),
                "domains": list(card.domains),
                "suites": list(card.suites),
                "source": card.source,
                "licence": card.licence,
                "place": None if (place := local_path(card)) is None else str(place),
                "wds": card.wds,
            }
            for card in self.cards
        }

    def tables(self) -> list[Table]:
        """Returns one row per card."""
        # As wide as the terminal; a narrow one has no room for sources.
        is_wide = shutil.get_terminal_size((160, 24)).columns >= _WIDE
        rows = []
        for card in self.cards:
            number = _num_classes(card)
            data = "here" if local_path(card) else "stream" if card.wds else "no"
            classes = "" if number is None else str(number)
            source = [_short(card.source)] * is_wide
            rows.append((card.name, card.title, classes, *source, _short(card.licence), data))
        header = ("name", "title", "classes", *["source"] * is_wide, "licence", "data")
        return [Table("", header, tuple(rows))]

    def lines(self) -> list[str]:
        """Returns how to get the data."""
        return [
            "Data: here, by its name; else give yours, NAME=DIR, or stream CLIP_benchmark's, "
            "NAME=wds/...; --json lists sources, licences and the names to stream."
        ]


def list_cards(suite: str | None = None) -> CardList:
    """Lists registered datasets: title, classes, source, license, and whether data is available.

    Args:
        suite: only those of a benchmark: ``coop``, ``kradapter``, ``imagenet-shift``,
            ``domainbed`` or ``vtab``.

    Raises:
        VlkrError: for an unknown suite, or a card that is not valid.
    """
    if suite is not None and suite not in SUITES:
        raise VlkrError(f"unknown suite {suite!r}, expected one of {', '.join(SUITES)}")
    cards = [load_card(name) for name in card_names()]
    return CardList([card for card in cards if suite is None or suite in card.suites])


def _num_classes(card: Card) -> int | None:
    names = card.named_classes()
    return None if names is None else len(names)


def _short(text: str, size: int = 36) -> str:
    return text if len(text) <= size else f"{text[: size - 3]}..."
