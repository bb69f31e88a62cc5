"""Whether a dataset's images and labels are what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlkr.datasets.images import decode_image
from vlkr.datasets.pack import FORMAT, MANIFEST
from vlkr.datasets.registry import load_dataset
from vlkr.datasets.samples import BadSample, Source
from vlkr.errors import VlkrError
from vlkr.files import read_json, sha256_of
from vlkr.reporting.table import Table
from vlkr.runtime import parallel_map, progress_bar


@dataclass
class Verification:
    """What was found.

    Attributes:
        reference: the dataset.
        samples: that are good, by split.
        problems: one a line.
        has_manifest: whether counts and checksums were there to compare with.
    """

    reference: str
    samples: dict[str, int]
    problems: list[str] = field(default_factory=list)
    has_manifest: bool = False

    @property
    def exit_code(self) -> int:
        """1 if something is wrong."""
        return int(bool(self.problems))

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "dataset": self.reference,
            "samples": self.samples,
            "manifest": self.has_manifest,
            "problems": self.problems,
        }

    def tables(self) -> list[Table]:
        """Returns no table."""
        return []

    def lines(self) -> list[str]:
        """Returns the problems and the counts."""
        counts = ", ".join(f"{split} {number:,}" for split, number in self.samples.items())
        against = (
            "counts and checksums compared"
            if self.has_manifest
            else f"no {MANIFEST} to compare counts and checksums with"
        )
        number = len(self.problems)
        verdict = f"{number} problem{'s' if number > 1 else ''}" if number else "no problem"
        problems = [f"bad: {problem}" for problem in self.problems]
        return [*problems, f"{verdict}; good images: {counts}; {against}"]


def verify(
    source: str,
    test_fraction: float = 0.5,
    num_workers: int = 0,
    allow_commands: bool = False,
) -> Verification:
    """Decodes every image of a dataset and compares shards with the manifest of their packing.

    Args:
        source: a folder of shards, or any other dataset.
        test_fraction: of a folder without splits, the part held out for testing.
        num_workers: processes that read and decode.
        allow_commands: let the source ``pipe:COMMAND`` run.

    Raises:
        VlkrError: if there is no dataset at all. What is wrong within it is told in the result.
    """
    manifest = _manifest(Path(source))
    try:
        dataset = load_dataset(source, test_fraction=test_fraction, allow_commands=allow_commands)
    except VlkrError as error:
        if not manifest:
            raise
        return Verification(source, {}, [str(error)], has_manifest=True)
    found = Verification(source, dict.fromkeys(dataset.splits, 0), has_manifest=bool(manifest))
    if manifest:
        found.problems += [
            f"split {split!r} is in the manifest and not in the data"
            for split in sorted(set(manifest["splits"]) - set(dataset.splits))
        ]
    with progress_bar() as progress:
        for split, part in dataset.splits.items():
            shards = part.shards()
            entries = manifest["splits"].get(split, {}).get("shards", []) if manifest else []
            if manifest and len(entries) != len(shards):
                found.problems.append(
                    f"split {split!r} has {len(shards)} shards, the manifest {len(entries)}"
                )
                entries = []
            jobs = [
                _Job(
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
                found.problems += checked.problems
                found.problems += [
                    f"key {key!r} occurs twice in the split {split!r}"
                    for key in checked.keys
                    if key in seen
                ]
                seen.update(checked.keys)
                found.samples[split] += len(checked.keys)
                progress.advance(task)
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("splits"), dict):
        raise VlkrError(f"{folder / MANIFEST} is no manifest of {FORMAT!r}")
    return manifest


class _Job(NamedTuple):
    shard: Source
    num_classes: int
    path: Path | None
    expected: dict[str, Any]


class _Checked(NamedTuple):
    keys: Sequence[str]
    problems: Sequence[str]


def _check(job: _Job) -> _Checked:
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
    return _Checked(keys, problems)
