"""Zero-shot evaluation against a plain open_clip loop over a DataLoader, on the same images.

Both build the classifier from the same templates, read JPEG files, preprocess them with the same
transform, encode them in batches of the same size and count top-1 and top-5; vlkr also has the
other metrics. ``images`` leaves the classifier out. Nothing comes from a cache. Ratios are
throughputs over the plain loop's, by the clock and by the processor time of all processes, which is
disturbed least by other load.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from timing import CLOCKS, interleave_clocks, median_ratio, write_report
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from vlkr.datasets import Dataset, load_dataset
from vlkr.datasets.prompts import resolve_templates
from vlkr.evaluation import evaluate
from vlkr.evaluation.evaluate import evaluate_model
from vlkr.models.clip import ClipBundle, image_size, load_clip

PARTS = {"whole": "", "images alone": " images"}


def write_photos(root: Path, images: int, classes: int) -> Path:
    """Writes JPEGs of smooth noise, 320x240, in ``test/<class>/``; their content is no matter."""
    generator = np.random.default_rng(0)
    for i in range(images):
        folder = root / "test" / f"class_{i % classes:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(generator.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        noise.resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return root


def load_model(name: str, folder: Path) -> ClipBundle:
    """A model by vlkr's name, or an open_clip architecture with random weights."""
    if name not in open_clip.list_models():
        return load_clip(name)
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return load_clip(name, str(folder / "weights.safetensors"))


def plain_classifier(bundle: ClipBundle, dataset: Dataset, device: str) -> Tensor:
    templates = [lambda c, t=template: t.replace("{c}", c) for template in dataset.templates]
    classifier: Tensor = open_clip.build_zero_shot_classifier(
        bundle.model, bundle.tokenizer, dataset.class_names, templates, device=device
    )
    return classifier


def plain_loop(
    bundle: ClipBundle, root: Path, classifier: Tensor, batch: int, workers: int, device: str
) -> tuple[float, float]:
    """Top-1 and top-5, as open_clip's documentation and training code evaluate."""
    images = ImageFolder(root / "test", bundle.preprocess)
    loader = DataLoader(images, batch_size=batch, num_workers=workers)
    top1 = top5 = 0.0
    with torch.no_grad():
        for batch_images, labels in loader:
            labels = labels.to(device)
            features = bundle.model.encode_image(batch_images.to(device), normalize=True)
            logits = bundle.model.logit_scale.exp() * features @ classifier
            hits = logits.topk(5).indices == labels[:, None]
            top1 += hits[:, 0].sum().item()
            top5 += hits.sum().item()
    return top1 / len(images), top5 / len(images)


def candidates(
    bundle: ClipBundle, dataset: Dataset, root: Path, options: argparse.Namespace, device: str
) -> dict[str, Callable[[], tuple[float, float]]]:
    """The whole evaluation and its images alone, ours and the plain loop; each gives accuracies."""
    ready = plain_classifier(bundle, dataset, device)
    ours_ready = ready.T.contiguous()
    own_embeddings = evaluate.dataset_embeddings

    def ours() -> tuple[float, float]:
        metrics = evaluate_model(
            bundle,
            [dataset],
            batch_size=options.batch,
            num_workers=options.workers,
            device=device,
        ).in_distribution.metrics
        return metrics["acc1"], metrics["acc5"]

    def our_images() -> tuple[float, float]:
        evaluate.dataset_embeddings = lambda *args, **kwargs: ours_ready
        try:
            return ours()
        finally:
            evaluate.dataset_embeddings = own_embeddings

    def plain() -> tuple[float, float]:
        classifier = plain_classifier(bundle, dataset, device)
        return plain_loop(bundle, root, classifier, options.batch, options.workers, device)

    def plain_images() -> tuple[float, float]:
        return plain_loop(bundle, root, ready, options.batch, options.workers, device)

    return {"open_clip": plain, "vlkr": ours, "open_clip images": plain_images} | {
        "vlkr images": our_images
    }


def check_same(accuracies: dict[str, tuple[float, float]]) -> None:
    """All candidates do the same work: their top-1 and top-5 agree but for near ties."""
    for values in zip(*accuracies.values(), strict=True):
        if max(values) - min(values) > 0.01:
            raise SystemExit(f"the accuracies differ: {accuracies}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "ViT-B-32"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--templates", default="imagenet7")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/evaluation"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = [f"{what}, {clock}" for clock in CLOCKS for what in PARTS]
    rows = [["model", "open_clip images/s", "vlkr images/s", *kinds]]
    figures: dict[str, object] = {"options": {**vars(options), "output": ""}}
    templates = resolve_templates([options.templates]).templates
    with tempfile.TemporaryDirectory() as folder:
        root = write_photos(Path(folder) / "photos", options.images, options.classes)
        dataset = load_dataset(root, templates=templates)
        for name in options.models:
            bundle = load_model(name, Path(folder))
            bundle.model.to(device)
            runs = candidates(bundle, dataset, root, options, device)
            check_same({run: call() for run, call in runs.items()})
            seconds = interleave_clocks(runs, options.rounds)
            ratios = {
                f"{what}, {clock}": median_ratio(seconds[clock], f"open_clip{part}", f"vlkr{part}")
                for clock in CLOCKS
                for what, part in PARTS.items()
            }
            wall = seconds["wall"]
            speed = {run: options.images / statistics.median(s) for run, s in wall.items()}
            figures[name] = {
                "images_per_second": speed,
                "throughput_over_open_clip": ratios,
            }
            rows.append(
                [
                    f"{name}, {image_size(bundle)[0]} px",
                    f"{speed['open_clip']:.1f}",
                    f"{speed['vlkr']:.1f}",
                    *(f"{ratio:.2f}" for ratio in ratios.values()),
                ]
            )
    title = (
        f"Zero-shot evaluation, {options.images} JPEGs, {options.classes} classes, "
        f"{len(templates)} templates, batch {options.batch}, {options.workers} workers"
    )
    write_report(title, rows, figures, options.output)


if __name__ == "__main__":
    main()
