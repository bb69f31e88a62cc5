"""Images a second through the loaders, against the limit and against ImageFolder; memory.

The limit is a bare loop that decodes and resizes the same bytes, held in memory, on as many
processes. ``evaluation`` resizes with Pillow, as open_clip's transform does; ``training`` takes the
random crop of torchvision's 8-bit tensors, as vlkr does. ``stream`` is vlkr's loader over shards,
whose batches are 8-bit; ``normalized`` also does in the main process what is left to the model's
device. ImageFolder with torch's DataLoader does what others do: Pillow in both cases, then ToTensor
and Normalize in the workers. Ratios are of throughput, by the clock and by the processor time of
all processes, which is disturbed least by other load; processes are started and ended within the
time. Memory is the peak of a process that reads once through shards of one size and of ten times
that size.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image
from timing import CLOCKS, interleave_clocks, median_ratio, write_report
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from vlkr.datasets import Sample, load_dataset
from vlkr.datasets.epochs import TrainLoader
from vlkr.datasets.images import decode_image
from vlkr.datasets.loading import BadSamples, TrainTransform, evaluation_loader, to_tensor
from vlkr.datasets.packing import pack
from vlkr.datasets.streaming import EpochPlan, StreamedBatches

SIZE, BUFFER = 224, 256
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EVALUATION = image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
TRAINING = TrainTransform((SIZE, SIZE), MEAN, STD, "bicubic", (0.5, 1.0), True)
PLAIN = {
    "evaluation": EVALUATION,
    "training": transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIZE, (0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    ),
}


def write_photos(root: Path, images: int) -> Path:
    """Writes JPEGs of 500x375 pixels, about 60 kB each, in two classes."""
    generator = np.random.default_rng(0)
    for i in range(images):
        folder = root / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(smooth.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
        noisy = (pixels + generator.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:05d}.jpg", quality=90)
    return root


def bare_loop(kind: str, data: list[bytes]) -> None:
    """Decodes and resizes, and nothing else."""
    resize = transforms.Compose(EVALUATION.transforms[:2])
    for image in data:
        if kind == "evaluation":
            resize(Image.open(io.BytesIO(image)).convert("RGB"))
        else:
            TRAINING(to_tensor(Image.open(io.BytesIO(image)).convert("RGB")))


def limit(kind: str, data: list[bytes], workers: int) -> None:
    """The bare loop, shared by ``workers`` processes; 0 is this one."""
    if workers == 0:
        bare_loop(kind, data)
        return
    start = multiprocessing.get_context("fork").Process
    shares = [data[i::workers] for i in range(workers)]
    running = [start(target=bare_loop, args=(kind, share)) for share in shares]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0


def train_loader(folder: Path, batch: int, workers: int) -> TrainLoader:
    """A stream of shuffled batches from shards."""
    dataset = load_dataset(folder)
    source = dataset.source("train")
    counts = [sum(1 for _ in shard) for shard in source.shards()]
    plan = EpochPlan(counts, batch, 1, 1, 0, BUFFER)
    bad = BadSamples()
    batches = StreamedBatches(source, plan, TRAINING, bad)
    return TrainLoader(batches, 0, bad, workers)


def candidates(
    kind: str, photos: Path, shards: Path, data: list[bytes], batch: int, workers: int
) -> dict[str, Callable[[], object]]:
    """One epoch each of the limit, our stream and ImageFolder."""
    if kind == "evaluation":
        source = load_dataset(shards).source("train")
        ours = evaluation_loader(source, EVALUATION, batch, workers)
        normalize = ours.normalize
    else:
        ours, normalize = train_loader(shards, batch, workers), TRAINING.normalize
    plain = DataLoader(
        ImageFolder(photos / "train", PLAIN[kind]),
        batch_size=batch,
        num_workers=workers,
        shuffle=kind == "training",
    )
    return {
        "limit": lambda: limit(kind, data, workers),
        "stream": lambda: check(len(data), (len(b.labels) for b in ours)),
        "normalized": lambda: check(len(data), (len(normalize(b.images)) for b in ours)),
        "ImageFolder": lambda: check(len(data), (len(labels) for _, labels in plain)),
    }


def check(expected: int, sizes: Iterable[int]) -> None:
    """Reads to the end; every image is there."""
    number = sum(sizes)
    if number != expected:
        raise SystemExit(f"{number} images instead of {expected}")


def bench_speed(options: argparse.Namespace, folder: Path) -> tuple[list[list[str]], dict]:
    """The table of throughputs and its figures."""
    photos = write_photos(folder / "photos", options.images)
    pack(str(photos), folder / "shards", samples_per_shard=max(1, options.images // 7))
    data = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    pairs = {
        "stream / limit": ("limit", "stream"),
        "ImageFolder / limit": ("limit", "ImageFolder"),
        "normalized / ImageFolder": ("ImageFolder", "normalized"),
    }
    rows = [["", "workers", "limit images/s", *(f"{p}, {c}" for c in CLOCKS for p in pairs)]]
    figures: dict[str, object] = {}
    for kind in options.kinds:
        for workers in options.workers:
            runs = candidates(kind, photos, folder / "shards", data, options.batch, workers)
            seconds = interleave_clocks(runs, options.rounds)
            ratios = {
                f"{pair}, {clock}": median_ratio(seconds[clock], *pairs[pair])
                for clock in CLOCKS
                for pair in pairs
            }
            speed = {n: options.images / statistics.median(s) for n, s in seconds["wall"].items()}
            figures[f"{kind}, {workers} workers"] = {"images_per_second": speed, "ratios": ratios}
            values = [f"{ratio:.2f}" for ratio in ratios.values()]
            rows.append([kind, str(workers), f"{speed['limit']:.0f}", *values])
            print(rows[-1], file=sys.stderr, flush=True)
    return rows, figures


def read_once(folder: Path, batch: int) -> None:
    """Reads all shards for evaluation and for training; prints this process's peak memory."""
    peaks = {"start": peak_mib()}
    for kind in ("evaluation", "training"):
        loader = (
            evaluation_loader(load_dataset(folder).source("train"), EVALUATION, batch, 0)
            if kind == "evaluation"
            else train_loader(folder, batch, 0)
        )
        images = sum(len(b.labels) for b in loader)
        peaks[kind] = peak_mib()
    print(json.dumps({"images": images, "peak_mib": peaks}))


def peak_mib() -> float:
    """Of this process's resident memory; getrusage would tell the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def bench_memory(options: argparse.Namespace, folder: Path) -> tuple[list[list[str]], dict]:
    """Peak memory against the size of the data."""
    photo = (folder / "photos" / "train" / "a" / "00000.jpg").read_bytes()
    rows = [["images", "MB of data", "MiB at the start", "MiB after evaluation", "after training"]]
    figures: dict[str, dict] = {}
    for times in (1, 10):
        number = options.memory_images * times
        for name in "ab":
            (folder / f"data{times}" / "train" / name).mkdir(parents=True)
        for i in range(number):
            path = folder / f"data{times}" / "train" / "ab"[i % 2] / f"{i}.jpg"
            path.write_bytes(photo)
        shards = folder / f"shards{times}"
        pack(str(folder / f"data{times}"), shards, samples_per_shard=options.memory_images // 5)
        command = [sys.executable, __file__, "--read-once", str(shards)]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        figures[f"{times}x"] = found
        megabytes = f"{number * len(photo) / 1e6:.0f}"
        rows.append([f"{number:,}", megabytes, *(f"{v:.0f}" for v in found["peak_mib"].values())])
    peaks = [figures[times]["peak_mib"] for times in ("1x", "10x")]
    ratios = {name: peaks[1][name] / peaks[0][name] for name in ("evaluation", "training")}
    figures["ratio"] = ratios
    rows.append(["ratio", "10", "", *(f"{ratio:.3f}" for ratio in ratios.values())])
    return rows, figures


def check_same_work(photos: Path) -> None:
    """What the limit leaves out is the conversion only: its pixels are those of the stream."""
    data = next(photos.rglob("*.jpg")).read_bytes()
    image = decode_image(Sample("k", data, 0))
    assert image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1680)
    parser.add_argument("--memory-images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=["evaluation", "training"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/data"))
    parser.add_argument("--read-once", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.read_once:
        read_once(options.read_once, options.batch)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        title = f"Loaders, {options.images} JPEGs of 500x375 pixels, batch {options.batch}"
        write_report(title, *bench_speed(options, folder), options.output / "speed")
        check_same_work(folder / "photos")
        title = f"Peak memory of a process that reads shards once, shuffle buffer {BUFFER}"
        write_report(title, *bench_memory(options, folder), options.output / "memory")


if __name__ == "__main__":
    main()
