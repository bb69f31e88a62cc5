"""Any dataset as webdataset shards in CLIP_benchmark's layout."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from vlkr.datasets.images import check_format, shrink
from vlkr.datasets.registry import Dataset, load_dataset
from vlkr.datasets.samples import BadSample, Sample, Source, good_samples, shuffled_by_hash
from vlkr.datasets.shards import tar_fields
from vlkr.errors import VlkrError
from vlkr.files import atomic_file, check_free, read_json, sha256_of, write_json, write_text
from vlkr.reporting.table import Table
from vlkr.runtime import interleave_jobs, parallel_map, progress_bar

MANIFEST = "manifest.json"
FORMAT = "vlkr shards 1"
_PARTIAL = ".pack.json"


@dataclass
class PackResult:
    """What was packed.

    Attributes:
        dest: the folder of shards.
        manifest: samples, bytes and checksums of each shard, by split.
        kept: shards that an earlier, interrupted packing had finished.
        bad: samples left out.
    """

    dest: Path
    manifest: Mapping[str, Any]
    kept: int
    bad: list[str]
    exit_code = 0

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "dest": str(self.dest),
            "kept_shards": self.kept,
            "bad_samples": self.bad,
            **self.manifest,
        }

    def tables(self) -> list[Table]:
        """Returns no table."""
        return []

    def lines(self) -> list[str]:
        """Returns what each split holds, what was left out, and where the shards are."""
        lines = []
        for split, content in self.manifest["splits"].items():
            shards = content["shards"]
            size = sum(shard["bytes"] for shard in shards) / 1e6
            number = f"{len(shards)} shard{'s' * (len(shards) != 1)}"
            lines.append(f"{split}: {content['samples']:,} images in {number}, {size:,.1f} MB")
        lines += [f"left out: {line}" for line in self.bad]
        return [*lines, f"Shards: {self.dest}"]


def pack(
    source: str,
    dest: Path,
    resize: int | None = None,
    samples_per_shard: int = 1000,
    shard_mb: int = 500,
    test_fraction: float = 0.5,
    num_workers: int = 0,
    max_bad: int = 0,
    allow_commands: bool = False,
    force: bool = False,
) -> PackResult:
    """Writes a dataset as webdataset shards in CLIP_benchmark's layout.

    The options are those of ``vlkr data pack``, whose help describes them.

    Raises:
        VlkrError: if the dataset cannot be read, a key occurs twice, or ``dest`` holds something
            else; nothing is written then.
    """
    for option, value in (("samples_per_shard", samples_per_shard), ("shard_mb", shard_mb)):
        if value < 1:
            raise VlkrError(f"{option} {value} is too small, expected at least 1")
    if resize is not None and resize < 8:
        raise VlkrError(f"resize {resize} is too small, expected at least 8 pixels")
    is_ours = (dest / MANIFEST).is_file() or (dest / _PARTIAL).is_file()
    if force and not is_ours:
        check_free(dest, hint="remove it yourself: it holds no shards of this command")
    check_free(dest, force=force or (dest / _PARTIAL).is_file())
    dataset = load_dataset(source, test_fraction=test_fraction, allow_commands=allow_commands)
    bad: list[str] = []
    with progress_bar() as progress:
        plans = {
            split: _scan(split, part, num_workers, progress, bad, max_bad)
            for split, part in dataset.splits.items()
        }
        digest = hashlib.sha256(f"{resize} {samples_per_shard} {shard_mb}".encode())
        for split, plan in plans.items():
            digest.update(f"{split} {plan.digest}".encode())
        if force and is_ours:
            shutil.rmtree(dest)
        finished = _finished(dest, digest.hexdigest())
        kept = len(finished)
        jobs = [
            _Job(split, number, start, stop)
            for split, plan in plans.items()
            for number, (start, stop) in enumerate(plan.shards(samples_per_shard, shard_mb * 1e6))
        ]
        left = [job for job in jobs if job.name not in finished]
        task = progress.add_task("writing shards", total=len(jobs), completed=kept)
        writer = _Writer(dest, plans, resize)
        unread = len(bad)

        def note() -> None:
            write_json(dest / _PARTIAL, {"digest": digest.hexdigest(), "shards": finished})

        note()  # ahead of the first shard, or a folder with that alone would not be ours
        for name, entry in parallel_map(writer, interleave_jobs(left, num_workers), num_workers):
            finished[name] = entry
            bad[unread:] = [
                line for job in jobs for line in finished.get(job.name, {}).get("bad", ())
            ]
            _check_bad(bad, max_bad)
            note()
            progress.advance(task)
    manifest = _finish(dest, dataset, jobs, finished, resize)
    return PackResult(dest, manifest, kept, bad)


def _check_bad(bad: Sequence[str], max_bad: int) -> None:
    if len(bad) > max_bad:
        raise VlkrError(
            f"more than {max_bad} bad samples; the last: {bad[max_bad]}" if max_bad else bad[0]
        )


class _Job(NamedTuple):
    """A shard to write: samples ``start`` up to ``stop`` of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number}.tar"


@dataclass(frozen=True)
class _Plan:
    """A split as it is read.

    Attributes:
        parts: of the source, in the order of the shards to write.
        ends: of each part, counted in samples.
        sizes: bytes of each sample.
        digest: of everything that goes into the shards.
    """

    parts: Sequence[Source]
    ends: Sequence[int]
    sizes: Sequence[int]
    digest: str

    def shards(self, most_samples: int, most_bytes: float) -> list[tuple[int, int]]:
        """First and last sample of each shard."""
        bounds = [0]
        held = 0
        for position, size in enumerate(self.sizes):
            full = position - bounds[-1] == most_samples or held + size > most_bytes
            if full and position > bounds[-1]:
                bounds.append(position)
                held = 0
            held += size
        return list(zip(bounds, [*bounds[1:], len(self.sizes)], strict=True))

    def read(self, start: int) -> Iterator[Sample]:
        """The samples from ``start`` on."""
        part = bisect_right(self.ends, start)
        skipped = start - (self.ends[part - 1] if part else 0)
        for i in range(part, len(self.parts)):
            samples = good_samples(self.parts[i])  # told by the scan
            yield from islice(samples, skipped if i == part else 0, None)


class _Scanned(NamedTuple):
    keys: list[str]
    sizes: list[int]
    digest: bytes
    bad: list[str]
    unwritable: list[str]


def _scan_part(part: Source) -> _Scanned:
    scanned = _Scanned([], [], b"", [], [])
    digest = hashlib.sha256()
    for sample in good_samples(part, lambda bad: scanned.bad.append(str(bad))):
        scanned.keys.append(sample.key)
        scanned.sizes.append(len(sample.image))
        extension = check_format(sample)
        if isinstance(extension, BadSample):  # which the writer will leave out
            scanned.unwritable.append(str(extension))
        digest.update(json.dumps([sample.key, sample.label, sample.domain]).encode())
        digest.update(hashlib.sha256(sample.image).digest())
    return scanned._replace(digest=digest.digest())


def _scan(
    split: str, source: Source, num_workers: int, progress: Progress, bad: list[str], max_bad: int
) -> _Plan:
    """Reads a split once, to know its samples before anything is written."""
    parts = shuffled_by_hash(source).shards()
    task = progress.add_task(f"reading {split}", total=len(parts))
    ends: list[int] = []
    sizes: list[int] = []
    unwritable: list[str] = []
    seen: set[str] = set()
    digest = hashlib.sha256()
    for scanned in parallel_map(_scan_part, parts, num_workers):
        bad += scanned.bad
        unwritable += scanned.unwritable
        _check_bad(bad + unwritable, max_bad)
        twice = next((key for key in scanned.keys if key in seen), None)
        if twice is not None:
            raise VlkrError(f"key {twice!r} occurs twice in the split {split!r}")
        seen.update(scanned.keys)
        sizes += scanned.sizes
        ends.append(len(sizes))
        digest.update(scanned.digest)
        progress.advance(task)
    if not sizes:
        raise VlkrError(f"split {split!r} has no image to pack")
    return _Plan(parts, ends, sizes, digest.hexdigest())


class _Writer:
    """Writes the shard of a job; reads on where the job before ended."""

    def __init__(self, dest: Path, plans: Mapping[str, _Plan], resize: int | None) -> None:
        self.dest = dest
        self.plans = plans
        self.resize = resize
        self.split, self.position = "", 0
        self.samples: Iterator[Sample] = iter(())

    def __call__(self, job: _Job) -> tuple[str, dict[str, Any]]:
        if (job.split, job.start) != (self.split, self.position):
            self.samples = self.plans[job.split].read(job.start)
        path = self.dest / job.name
        entry: dict[str, Any] = {"samples": 0}
        bad: list[str] = []
        with atomic_file(path) as temporary:
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
                for _ in range(job.start, job.stop):
                    sample = next(self.samples, None)
                    if sample is None:
                        raise VlkrError(f"the data changed: {path} lacks samples that were there")
                    small = shrink(sample, self.resize)
                    files = small if isinstance(small, BadSample) else tar_fields(small)
                    if isinstance(files, BadSample):
                        bad.append(str(files))
                        continue
                    for name, content in files:
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
                    entry["samples"] += 1
            entry |= {"bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
        self.split, self.position = job.split, job.stop
        return job.name, entry | ({"bad": bad} if bad else {})


def _finished(dest: Path, digest: str) -> dict[str, dict[str, Any]]:
    """The shards of an interrupted packing that are whole."""
    if not (dest / _PARTIAL).is_file():
        return {}
    partial = read_json(dest / _PARTIAL)
    if partial.get("digest") != digest:
        raise VlkrError(
            f"{dest} holds an unfinished packing of other images or options; --force starts anew"
        )
    shards: dict[str, dict[str, Any]] = partial["shards"]
    return {
        name: entry
        for name, entry in shards.items()
        if (dest / name).is_file() and sha256_of(dest / name) == entry["sha256"]
    }


def _finish(
    dest: Path,
    dataset: Dataset,
    jobs: Sequence[_Job],
    finished: Mapping[str, dict[str, Any]],
    resize: int | None,
) -> dict[str, Any]:
    """Writes the files around the shards."""
    splits: dict[str, dict[str, Any]] = {}
    for job in jobs:
        entry = {name: finished[job.name][name] for name in ("samples", "bytes", "sha256")}
        content = splits.setdefault(job.split, {"samples": 0, "shards": []})
        content["samples"] += entry["samples"]
        content["shards"].append(entry)
    manifest = {"format": FORMAT, "name": dataset.name, "resize": resize, "splits": splits}
    lists = {
        "classnames.txt": dataset.class_names,
        "zeroshot_classification_templates.txt": dataset.templates,
        "domains.txt": dataset.domains,
    }
    for name, lines in lists.items():
        if lines:
            write_text(dest / name, "\n".join(lines) + "\n")
    for split, content in splits.items():
        write_text(dest / split / "nshards.txt", f"{len(content['shards'])}\n")
    write_json(dest / MANIFEST, manifest)
    (dest / _PARTIAL).unlink(missing_ok=True)
    return manifest
