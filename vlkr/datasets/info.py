"""What a dataset holds, in numbers and in a picture."""

from __future__ import annotations

import io
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from vlkr.datasets.images import decode_image, image_extension
from vlkr.datasets.registry import Dataset, load_dataset
from vlkr.datasets.samples import BadSample, Sample, Source, good_samples, unit_hash
from vlkr.errors import VlkrError
from vlkr.files import atomic_file
from vlkr.reporting.table import Table
from vlkr.runtime import parallel_map, progress_bar

_TILE, _MARGIN, _TEXT = 96, 4, 14
_MOST_ROWS, _COLUMNS = 24, 8
_MOST_LINES = 50
_PILLOW = {"jpg": "JPEG", "tif": "TIFF"}


@dataclass
class SplitInfo:
    """A split in numbers.

    Attributes:
        counts: images by label and domain.
        sizes: images by width and height in pixels.
        formats: images by file extension.
        bytes: of all encoded images.
        bad: samples that cannot be read.
    """

    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    bad: int = 0

    @property
    def images(self) -> int:
        """That can be read."""
        return self.counts.total()

    def of_class(self, label: int) -> int:
        """Images of a class."""
        return sum(number for (own, _), number in self.counts.items() if own == label)

    def of_domain(self, domain: str) -> int:
        """Images of a domain."""
        return sum(number for (_, own), number in self.counts.items() if own == domain)

    def add(self, other: SplitInfo) -> None:
        """Counts another part in."""
        self.counts += other.counts
        self.sizes += other.sizes
        self.formats += other.formats
        self.bytes += other.bytes
        self.bad += other.bad

    def sides(self) -> dict[str, list[float]]:
        """Least, median and largest width and height in pixels."""
        found: dict[str, list[float]] = {}
        for i, name in enumerate(("width", "height")):
            values = sorted(size[i] for size in self.sizes.elements())
            found[name] = [values[0], statistics.median(values), values[-1]] if values else []
        return found


@dataclass
class InfoResult:
    """A dataset in numbers.

    Attributes:
        dataset: what was looked at.
        splits: numbers by split.
        sheet: the contact sheet, if one was asked for.
    """

    dataset: Dataset
    splits: dict[str, SplitInfo]
    sheet: Path | None = None
    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program; counts are by class, then by domain."""
        splits = {}
        for split, info in self.splits.items():
            classes: dict[str, dict[str, int]] = {name: {} for name in self.dataset.class_names}
            for (label, domain), number in sorted(info.counts.items()):
                classes[self.dataset.class_names[label]][domain or "all"] = number
            splits[split] = {
                "images": info.images,
                "bytes": info.bytes,
                "bad": info.bad,
                "counts": classes,
                "pixels": info.sides(),
                "formats": dict(sorted(info.formats.items())),
            }
        return {
            "dataset": self.dataset.name,
            "templates": list(self.dataset.templates),
            "domains": list(self.dataset.domains),
            "splits": splits,
            "contact_sheet": None if self.sheet is None else str(self.sheet),
        }

    def tables(self) -> list[Table]:
        """Returns the number of images by class and, of data with domains, by domain."""
        tables = [_table("class", self.splits, self.dataset.class_names, SplitInfo.of_class)]
        if domains := self.dataset.domains:
            tables.append(
                _table("domain", self.splits, domains, lambda info, i: info.of_domain(domains[i]))
            )
        return tables

    def lines(self) -> list[str]:
        """Returns what the images of each split are like."""
        lines = []
        if (more := len(self.dataset.class_names) - _MOST_LINES) > 0:
            lines.append(f"and {more} more classes; --json has all of them")
        for split, info in self.splits.items():
            formats = ", ".join(f"{number:,} {kind}" for kind, number in info.formats.most_common())
            sides = ", ".join(
                f"{name} {low:g} to {high:g} (median {median:g})"
                for name, (low, median, high) in info.sides().items()
            )
            bad = f"; {info.bad} that cannot be read" if info.bad else ""
            lines.append(
                f"{split}: {info.images:,} images ({formats}), {info.bytes / 1e6:,.1f} MB; "
                f"{sides} pixels{bad}"
            )
        if self.sheet is not None:
            lines.append(f"Contact sheet: {self.sheet}")
        return lines


def _table(
    head: str,
    splits: dict[str, SplitInfo],
    names: Sequence[str],
    count: Callable[[SplitInfo, int], int],
) -> Table:
    rows = [
        [name, *(f"{count(info, i):,}" for info in splits.values())]
        for i, name in enumerate(names[:_MOST_LINES])
    ]
    return Table.of("", [[head, *splits], *rows])


def info(
    source: str,
    output: Path | None = None,
    test_fraction: float = 0.5,
    num_workers: int = 0,
    allow_commands: bool = False,
) -> InfoResult:
    """Counts a dataset's images by class and domain, and tells sizes and formats.

    Args:
        source: a card's name, a folder of images or shards, a table or a URL.
        output: a PNG to write, a contact sheet with some images of each class.
        test_fraction: of a folder without splits, the part held out for testing.
        num_workers: processes that read.
        allow_commands: let the source ``pipe:COMMAND`` run.

    Raises:
        VlkrError: if the dataset cannot be read.
    """
    if output is not None and output.suffix.lower() != ".png":
        raise VlkrError(f"output {output} is no PNG, expected a name that ends in .png")
    dataset = load_dataset(source, test_fraction=test_fraction, allow_commands=allow_commands)
    splits = {split: SplitInfo() for split in dataset.splits}
    with progress_bar() as progress:
        for split, part in dataset.splits.items():
            shards = part.shards()
            task = progress.add_task(f"reading {split}", total=len(shards))
            for described in parallel_map(_describe, shards, num_workers):
                splits[split].add(described)
                progress.advance(task)
    if output is not None:
        with atomic_file(output) as temporary:
            contact_sheet(dataset).save(temporary, "png")
    return InfoResult(dataset, splits, output)


def _describe(shard: Source) -> SplitInfo:
    """Numbers of a part; images are measured by their headers, not decoded."""
    found = SplitInfo()
    bad: list[BadSample] = []
    for sample in good_samples(shard, bad.append):
        kind = image_extension(sample.image)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a large image
                formats = [_PILLOW.get(str(kind), str(kind).upper())]
                size = Image.open(io.BytesIO(sample.image), formats=formats).size
        except Exception:  # whatever Pillow's parsers stumble over
            found.bad += 1
            continue
        found.counts[sample.label, sample.domain or ""] += 1
        found.sizes[size] += 1
        found.formats[str(kind)] += 1
        found.bytes += len(sample.image)
    found.bad += len(bad)
    return found


def contact_sheet(dataset: Dataset) -> Image.Image:
    """Some images of each class, a row a class, chosen by a hash of their keys.

    With domains a row shows each of them in turn.
    """
    source = dataset.splits.get("train") or next(iter(dataset.splits.values()))
    rows = min(len(dataset.class_names), _MOST_ROWS)
    heaps: dict[tuple[int, str], list[tuple[float, str, bytes]]] = {}
    each = -(-_COLUMNS // max(1, len(dataset.domains)))
    for sample in good_samples(source):
        if sample.label < rows:
            heap = heaps.setdefault((sample.label, sample.domain or ""), [])
            heap.append((unit_hash(sample.key), sample.key, sample.image))
            if len(heap) > each:
                heap.remove(max(heap))
    height = _TEXT + _TILE + _MARGIN
    sheet = Image.new("RGB", (_COLUMNS * (_TILE + _MARGIN) + _MARGIN, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for label in range(rows):
        draw.text((_MARGIN, label * height), dataset.class_names[label], fill="black")
        lists = [sorted(heap) for (own, _), heap in sorted(heaps.items()) if own == label]
        chosen = [entry for turn in zip_longest(*lists) for entry in turn if entry is not None]
        for column, (_, key, image) in enumerate(chosen[:_COLUMNS]):
            place = _MARGIN + column * (_TILE + _MARGIN), label * height + _TEXT
            decoded = decode_image(Sample(key, image, label))
            if isinstance(decoded, BadSample):
                tile = Image.new("RGB", (_TILE, _TILE), "red")
            else:
                tile = ImageOps.pad(decoded, (_TILE, _TILE), color="white")
            sheet.paste(tile, place)
    return sheet
