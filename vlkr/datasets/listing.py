"""The datasets that are known by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from vlkr.datasets.cards import SUITES, Card, card_names, load_card
from vlkr.datasets.registry import local_path
from vlkr.errors import VlkrError

_WIDE = 110  # columns


@dataclass
class CardList:
    """Cards, by name."""

    cards: Sequence[Card]

    def to_json(self) -> dict[str, Any]:
        """What the cards tell, and where the data lies."""
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

    def show(self, console: Console) -> None:
        """Prints a line a card; a narrow terminal has no room for sources."""
        is_wide = console.width >= _WIDE
        table = Table(
            Column("name", no_wrap=True),
            "title",
            Column("classes", justify="right", no_wrap=True),
            *["source"] * is_wide,
            "licence",
            Column("data", no_wrap=True),
        )
        for card in self.cards:
            number = _num_classes(card)
            place = "here" if local_path(card) else "stream" if card.wds else "no"
            table.add_row(
                card.name,
                card.title,
                "" if number is None else str(number),
                *[_short(card.source)] * is_wide,
                _short(card.licence),
                place,
            )
        console.print(table)
        console.print(
            "Data: here, by its name; else give yours, NAME=DIR, or stream CLIP_benchmark's, "
            "NAME=wds/...; --json tells sources, licences and the names to stream in full.",
            highlight=False,
        )


def list_cards(suite: str | None = None) -> CardList:
    """Lists the known datasets: title, classes, source, licence, and whether the data is at hand.

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
