"""A small CLIP with random weights, and images whose colour tells their class."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from webdataset.tariterators import base_plus_ext

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"
COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}
_PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def tolerance(
    like: torch.Tensor, terms: int = 1, condition: float = 1.0, scale: float = 0.0
) -> float:
    """The largest difference that rounding makes between two ways of computing ``like``.

    Every product and sum is off by an eps of the dtype, a sum of ``terms`` by so many at worst, and
    what follows multiplies that by ``condition``. A factor of 32 leaves room for other kernels and
    for injected noise.

    Args:
        like: one of the results; its largest magnitude counts.
        terms: length of the longest sum.
        condition: by how much errors of the operands grow.
        scale: magnitude of the summed terms, where they may cancel.
    """
    largest = max(float(like.detach().abs().max()), scale) or 1.0
    return 32 * torch.finfo(like.dtype).eps * terms * condition * largest


def assert_near(actual, expected, *, terms=64, condition=1.0, scale=0.0) -> None:
    """Asserts that tensors, or sequences of tensors, differ by no more than :func:`tolerance`."""
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    for one, other in zip(actual, expected, strict=True):
        atol = tolerance(other, terms, condition, scale) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=atol, check_stride=False)


def write_clip(folder: Path, seed: int = 0) -> str:
    """Writes an open_clip folder with random weights; returns the model's name for vlkr."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**MODEL)
    config = {"model_cfg": MODEL, "preprocess_cfg": _PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def color_image(name: str, seed: int) -> bytes:
    """A PNG of 20x20 pixels, a class's colour with noise."""
    noise = np.random.default_rng(seed).normal(0, 25, (20, 20, 3))
    pixels = np.clip(np.array(COLORS[name]) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_images(
    root: Path, per_class: int = 12, names: Iterable[str] = COLORS, splits: Sequence[str] = ("",)
) -> Path:
    """Writes ``<class>/<i>.png``, below each split's folder if there are splits."""
    for s, split in enumerate(splits):
        for c, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                (folder / f"{i}.png").write_bytes(color_image(name, 10_000 * s + 100 * c + i))
    return root


def write_tar(path: Path, samples: Iterable[tuple[str, bytes, object]]) -> None:
    """Writes one webdataset shard of ``(key, image, label)``, with the standard library alone."""
    with tarfile.open(path, "w") as archive:
        for key, image, label in samples:
            for extension, content in (("png", image), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def records_of_tar(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Key and fields of webdataset's records, by the standard library and webdataset alone."""
    with tarfile.open(path, "r:") as archive:
        files = [(m.name, archive.extractfile(m).read()) for m in archive if m.isreg()]
    named = [(*base_plus_ext(name), content) for name, content in files]
    kept = [entry for entry in named if entry[0] is not None and not entry[0].startswith("__")]
    groups = groupby(kept, key=lambda entry: entry[0])
    return [(key, {e.lower(): content for _, e, content in group}) for key, group in groups]


def write_shards(
    root: Path,
    per_class: int = 8,
    shards: int = 2,
    splits: Sequence[str] = ("train", "test"),
    labels: Sequence[object] = (0, 1, 2),
) -> Path:
    """Writes a dataset of shards in CLIP_benchmark's layout, its samples dealt out in turn."""
    root.mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(COLORS) + "\n")
    for s, split in enumerate(splits):
        (root / split).mkdir()
        (root / split / "nshards.txt").write_text(str(shards))
        samples = [
            (f"s{c}_{i}", color_image(name, 10_000 * s + 100 * c + i), label)
            for i in range(per_class)
            for c, (name, label) in enumerate(zip(COLORS, labels, strict=True))
        ]
        for shard in range(shards):
            write_tar(root / split / f"{shard}.tar", samples[shard::shards])
    return root


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below ``folder``: file contents by relative path, None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def small_run(output: Path, model: str, root: Path, **changes: object) -> None:
    """Adapts ``model`` to the images below ``root`` in a second, with few steps and shots."""
    from vlkr.config import AdapterConfig, OptimizerConfig, TrainerConfig
    from vlkr.datasets import DataConfig
    from vlkr.training.recipe import adapt

    options = {
        "adapter": AdapterConfig(),
        "data": DataConfig(root=root, shots=4, batch_size=8, min_steps_per_epoch=3),
        "optimizer": OptimizerConfig(lr=1e-2),
        "trainer": TrainerConfig(epochs=2, accelerator="cpu", progress=False),
    }
    return adapt(output, model, **(options | changes))
