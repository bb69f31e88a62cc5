"""Inspects datasets: verifies images and labels, and counts them."""

from __future__ import annotations

import io
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageOps

from vlkr.datasets.images import decode_image, image_extension
from vlkr.datasets.packing import FORMAT, MANIFEST
from vlkr.datasets.registry import Dataset, load_dataset
from vlkr.datasets.samples import BadSample, Sample, Source, good_samples, unit_hash
from vlkr.errors import VlkrError
from vlkr.files import atomic_file, read_json, sha256_of
from vlkr.reporting.table import Table
from vlkr.runtime import parallel_map, progress_bar

_TILE, _MARGIN, _TEXT = 96, 4, 14
_MAX_ROWS, _COLUMNS = 24, 8
_MAX_LINES = 50
_PILLOW = {"jpg": "JPEG", "tif": "TIFF"}


@dataclass
class Verification:
    """The result of :func:`verify`.

    Attributes:
        reference: the dataset.
        samples: number of good samples, by split.
        problems: one line each.
        has_manifest: whether there were counts and checksums to compare with.
    """

    reference: str
    samples: dict[str, int]
    problems: list[str] = field(default_factory=list)
    has_manifest: bool = False

    @property
    def exit_code(self) -> int:
        """1 if there is a problem."""
        return int(bool(self.problems))

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain JSON."""
        return {
            "dataset": self.reference,
            "samples": self.samples,
            "manifest": self.has_manifest,
            "problems": self.problems,
        }

    def tables(self) -> list[Table]:
        """Returns no table: a problem is a line."""
        return []

    def lines(self) -> list[str]:
        """Returns the problems and the counts."""
        counts = ", ".join(f"{split} {number:,}" for split, number in self.samples.items())
        compared = (
            "counts and checksums compared"
            if self.has_manifest
            else f"no {MANIFEST} to compare counts and checksums with"
        )
        number = len(self.problems)
        verdict = f"{number} problem{'s' if number > 1 else ''}" if number else "no problem"
        problems = [f"bad: {problem}" for problem in self.problems]
        return [*problems, f"{verdict}; good images: {counts}; {compared}"]


def verify(
    source: str,
    test_fraction: float = 0.5,
    num_workers: int = 0,
    allow_commands: bool = False,
) -> Verification:
    """Decodes every image of a dataset and compares shards with the manifest of their packing.

    Args:
        source: a folder of shards, or any other dataset.
        test_fraction: fraction of images held out for testing if the data has no splits.
        num_workers: processes that read and decode; 0 for the main process.
        allow_commands: allow the source ``pipe:COMMAND``.

    Raises:
        VlkrError: if there is no dataset. Problems within it are part of the result.
    """
    manifest = _manifest(Path(source))
    try:
        dataset = load_dataset(source, test_fraction=test_fraction, allow_commands=allow_commands)
    except VlkrError as error:
        if not manifest:
            raise
        return Verification(source, {}, [str(error)], has_manifest=True)
    result = Verification(source, dict.fromkeys(dataset.splits, 0), has_manifest=bool(manifest))
    if manifest:
        result.problems += [
            f"split {split!r} is in the manifest but not in the data"
            for split in sorted(set(manifest["splits"]) - set(dataset.splits))
        ]
    with progress_bar() as progress:
        for split, part in dataset.splits.items():
            shards = part.shards()
            entries = manifest["splits"].get(split, {}).get("shards", []) if manifest else []
            if manifest and len(entries) != len(shards):
                result.problems.append(
                    f"split {split!r} has {len(shards)} shards, the manifest {len(entries)}"
                )
                entries = []
            jobs = [
                _ShardJob(
                    shard,
                    len(dataset.class_names),
                    Path(source) / split / f"{i}.tar" if entries else None,
                    entries[i] if entries else {},
                )
                for i, shard in enumerate(shards)
            ]
            task = progress.add_task(f"verifying {split}", total=len(jobs))
            seen: set[str] = set()
            for checked in parallel_map(_check, jobs, num_workers):
                result.problems += checked.problems
                result.problems += [
                    f"key {key!r} occurs twice in the split {split!r}"
                    for key in checked.keys
                    if key in seen
                ]
                seen.update(checked.keys)
                result.samples[split] += len(checked.keys)
                progress.advance(task)
    return result


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("splits"), dict):
        raise VlkrError(f"{folder / MANIFEST} is not a manifest of {FORMAT!r}")
    return manifest


class _ShardJob(NamedTuple):
    shard: Source
    num_classes: int
    path: Path | None
    expected: dict[str, Any]


class _CheckedShard(NamedTuple):
    keys: Sequence[str]
    problems: Sequence[str]


def _check(job: _ShardJob) -> _CheckedShard:
    """Decodes a shard's images; compares its file with its entry in the manifest."""
    keys: list[str] = []
    problems: list[str] = []
    try:
        if job.path is not None and sha256_of(job.path) != job.expected.get("sha256"):
            problems.append(f"{job.path} is not the file of the manifest, its checksum differs")
        for sample in job.shard:
            checked = sample if isinstance(sample, BadSample) else decode_image(sample)
            if isinstance(sample, BadSample) or isinstance(checked, BadSample):
                problems.append(str(checked))
            elif not 0 <= sample.label < job.num_classes:
                reason = f"has label {sample.label}, expected below {job.num_classes}"
                problems.append(str(sample.bad(reason)))
            else:
                keys.append(sample.key)
    except (VlkrError, OSError) as error:  # the shard ends here
        problems.append(str(error))
    expected = job.expected.get("samples", len(keys))
    if job.path is not None and expected != len(keys):
        problems.append(f"{job.path} has {len(keys)} good samples, the manifest counts {expected}")
    return _CheckedShard(keys, problems)


@dataclass
class SplitInfo:
    """Statistics of a split.

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
        """Number of images that can be read."""
        return self.counts.total()

    def add(self, other: SplitInfo) -> None:
        """Adds another part's counts."""
        self.counts += other.counts
        self.sizes += other.sizes
        self.formats += other.formats
        self.bytes += other.bytes
        self.bad += other.bad

    def sides(self) -> dict[str, list[float]]:
        """Returns the smallest, median and largest width and height in pixels."""
        sides: dict[str, list[float]] = {}
        for i, name in enumerate(("width", "height")):
            values = sorted(size[i] for size in self.sizes.elements())
            sides[name] = [values[0], statistics.median(values), values[-1]] if values else []
        return sides


@dataclass
class DatasetInfo:
    """The result of :func:`info`.

    Attributes:
        dataset: the dataset.
        splits: statistics by split.
        sheet: path of the contact sheet, if one was written.
    """

    exit_code = 0

    dataset: Dataset
    splits: dict[str, SplitInfo]
    sheet: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain JSON; counts are by class, then by domain."""
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
        """Returns the images by class and, where there are domains, by domain."""
        names = self.dataset.class_names
        by_class = self._counts("class", names, lambda key: names[key[0]])
        domains = self.dataset.domains
        return [
            by_class,
            *([self._counts("domain", domains, lambda key: key[1])] if domains else []),
        ]

    def _counts(
        self, header: str, names: Sequence[str], name: Callable[[tuple[int, str]], str]
    ) -> Table:
        counts: dict[str, Counter[str]] = {split: Counter() for split in self.splits}
        for split, info in self.splits.items():
            for key, number in info.counts.items():
                counts[split][name(key)] += number
        rows = (
            (shown, *(f"{by_name[shown]:,}" for by_name in counts.values()))
            for shown in names[:_MAX_LINES]
        )
        return Table("", (header, *self.splits), tuple(rows))

    def lines(self) -> list[str]:
        """Returns what the images of each split are like."""
        lines = []
        if (more := len(self.dataset.class_names) - _MAX_LINES) > 0:
            lines.append(f"and {more} more classes; --json lists all of them")
        for split, info in self.splits.items():
            formats = ", ".join(f"{number:,} {kind}" for kind, number in info.formats.most_common())
            sides = ", ".join(
                f"{name} {low:g} to {high:g} (median {median:g})"
                for name, (low, median, high) in info.sides().items()
            )
            bad = f"; {info.bad} cannot be read" if info.bad else ""
            lines.append(
                f"{split}: {info.images:,} images ({formats}), {info.bytes / 1e6:,.1f} MB; "
                f"{sides} pixels{bad}"
            )
        if self.sheet is not None:
            lines.append(f"Contact sheet: {self.sheet}")
        return lines


def info(
    source: str,
    output: Path | None = None,
    test_fraction: float = 0.5,
    num_workers: int = 0,
    allow_commands: bool = False,
) -> DatasetInfo:
    """Counts a dataset's images by class and domain, and reports sizes and formats.

    Args:
        source: a card's name, a folder of images or shards, a table or a URL.
        output: PNG to write: a contact sheet with some images of each class.
        test_fraction: fraction of images held out for testing if the data has no splits.
        num_workers: processes that read; 0 for the main process.
        allow_commands: allow the source ``pipe:COMMAND``.

    Raises:
        VlkrError: if the dataset cannot be read.
    """
    if output is not None and output.suffix.lower() != ".png":
        raise VlkrError(f"output {output} must end in .png")
    dataset = load_dataset(source, test_fraction=test_fraction, allow_commands=allow_commands)
    splits = {split: SplitInfo() for split in dataset.splits}
    with progress_bar() as progress:
        for split, part in dataset.splits.items():
            shards = part.shards()
            task = progress.add_task(f"reading {split}", total=len(shards))
            for part_info in parallel_map(_shard_info, shards, num_workers):
                splits[split].add(part_info)
                progress.advance(task)
    if output is not None:
        with atomic_file(output) as temporary:
            contact_sheet(dataset).save(temporary, "png")
    return DatasetInfo(dataset, splits, output)


def _shard_info(shard: Source) -> SplitInfo:
    """Returns a part's statistics; sizes come from headers, without decoding."""
    part = SplitInfo()
    bad: list[BadSample] = []
    for sample in good_samples(shard, bad.append):
        kind = image_extension(sample.image)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a large image
                formats = [_PILLOW.get(str(kind), str(kind).upper())]
                size = Image.open(io.BytesIO(sample.image), formats=formats).size
        except Exception:  # Pillow's parsers raise anything
            part.bad += 1
            continue
        part.counts[sample.label, sample.domain or ""] += 1
        part.sizes[size] += 1
        part.formats[str(kind)] += 1
        part.bytes += len(sample.image)
    part.bad += len(bad)
    return part


def contact_sheet(dataset: Dataset) -> Image.Image:
    """Draws some images of each class, one row per class, chosen by a hash of their keys.

    With domains a row alternates between them.
    """
    source = dataset.splits.get("train") or next(iter(dataset.splits.values()))
    rows = min(len(dataset.class_names), _MAX_ROWS)
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
