"""Zero-shot classification: accuracy of a model, adapted or not, on datasets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import Tensor, nn

from vlkr.adapters import merged
from vlkr.adapters.inject import hosts
from vlkr.datasets import Dataset, load_dataset
from vlkr.datasets.pipelines import evaluation_loader
from vlkr.errors import VlkrError
from vlkr.evaluation.metrics import classification_metrics
from vlkr.evaluation.report import DatasetResult, Evaluation, evaluation_markdown
from vlkr.evaluation.runs import load_run
from vlkr.files import check_free, write_json, write_text
from vlkr.models.clip import ClipBundle, encode_image, load_clip, logit_scale, pick_device
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts


def evaluate(
    model: str | None = None,
    pretrained: str | None = None,
    run: Path | None = None,
    datasets: list[str] | None = None,
    shifts: bool = True,
    split: str = "test",
    templates: list[str] | None = None,
    test_fraction: float = 0.5,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    output: Path | None = None,
    force: bool = False,
) -> Evaluation:
    """Measures a model on its home dataset and under domain shift.

    Args:
        model: for zero-shot: ``tiny``, an open_clip name, ``hf-hub:org/repo``, ``local-dir:/path``.
        pretrained: open_clip's tag or a path of weights.
        run: for an adapted model: a folder written by ``vlkr adapt``.
        datasets: cards' names or folders, the home dataset first; the run's own by default.
        shifts: also measure the shifts that the home dataset's card names.
        split: which split of each dataset.
        templates: prompts with ``{c}`` in place of each dataset's own.
        test_fraction: of a folder without splits, the part that is its test split.
        batch_size: images at a time.
        num_workers: processes that decode images; 0 does it in the main one.
        device: ``auto``, ``cpu``, ``cuda``, ...
        output: folder for ``metrics.json`` and ``report.md``.
        force: write into a folder that holds something.

    Raises:
        VlkrError: for a model, run or dataset that cannot be read.
    """
    if (model is None) == (run is None):
        raise VlkrError("evaluate needs either --model NAME or --run DIR")
    if run is not None and pretrained is not None:
        raise VlkrError("--pretrained goes with --model; a run knows its own weights")
    if output is not None:
        check_free(output, force=force)
    context: dict[str, Any] = {}
    if run is not None:
        bundle, config = load_run(run)
        data = config["data"]
        context = {
            "adapter": config["adapter"]["name"],
            "options": config["adapter"]["options"],
            "shots": data["shots"],
            "seed": config["seed"],
            "checkpoint": "last iteration",
        }
        datasets = datasets or [data["root"] or data["name"]]
        templates = data["templates"] if templates is None else templates
        test_fraction = data["test_fraction"]
    else:
        bundle = load_clip(str(model), pretrained)
    given = None if templates is None else tuple(templates)
    names = list(datasets or ["digits"])
    loaded = [load_dataset(n, templates=given, test_fraction=test_fraction) for n in names]
    if shifts:
        loaded += [load_dataset(n, templates=given) for n in loaded[0].shifts if n not in names]
    evaluation = evaluate_bundle(
        bundle, loaded, split=split, batch_size=batch_size, num_workers=num_workers, device=device
    )
    evaluation.context |= context
    if output is not None:
        write_json(output / "metrics.json", evaluation.to_json())
        write_text(output / "report.md", evaluation_markdown(evaluation))
    return evaluation


def evaluate_bundle(
    bundle: ClipBundle,
    datasets: Sequence[Dataset],
    *,
    split: str = "test",
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
) -> Evaluation:
    """Measures a loaded model, with or without adapters, on loaded datasets.

    Args:
        bundle: the model; its adapters are merged while it is measured and come off again.
        datasets: the home dataset first.
        split: which split of each.
        batch_size: images at a time.
        num_workers: processes that decode images.
        device: where to compute.
    """
    target = pick_device(device)
    if batch_size < 1:
        raise VlkrError(f"batch size {batch_size} is too small, expected at least 1")
    if num_workers < 0:
        raise VlkrError(f"number of workers {num_workers} is negative")
    sources = [dataset.source(split) for dataset in datasets]
    model = bundle.model.to(target).eval()
    adapted = any(True for _ in hosts(model))
    progress = Progress(
        *Progress.get_default_columns()[:2],
        TextColumn("{task.completed} images"),
        console=Console(stderr=True),
        transient=True,
    )
    results: list[DatasetResult] = []
    embedded: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}
    with merged(model) if adapted else nullcontext(), torch.inference_mode(), progress:
        for dataset, source in zip(datasets, sources, strict=True):
            task = progress.add_task(dataset.name, total=dataset.sizes.get(split))
            texts = (dataset.class_names, dataset.templates)
            if texts not in embedded:
                prompts = tokenize_prompts(bundle.tokenizer, *texts)
                embedded[texts] = class_embeddings(model, prompts.to(target), chunk=64)
            metrics = classification_metrics(len(dataset.class_names)).to(target)
            images = 0
            for batch in evaluation_loader(source, bundle.preprocess, batch_size, num_workers):
                logits = _logits(model, batch.images.to(target), embedded[texts])
                if not logits.isfinite().all():
                    raise VlkrError(
                        f"the model's logits on {dataset.name} are not finite: its training "
                        "diverged, or its weights are damaged"
                    )
                metrics.update(logits, batch.labels.to(target))
                images += len(batch.labels)
                progress.update(task, completed=images)
            expected = dataset.sizes.get(split, images)
            if images == 0 or images != expected:
                raise VlkrError(
                    f"dataset {dataset.name!r} has {images or 'no'} images in its split {split!r}, "
                    f"expected {expected or 'some'}"
                )
            values = {name: round(float(v), 6) for name, v in metrics.compute().items()}
            results.append(DatasetResult(dataset.name, split, images, dataset.template_set, values))
    context = {
        "model": bundle.name,
        "pretrained": bundle.pretrained,
        "weights_sha256": bundle.weights_hash,
    }
    return Evaluation(results, context)


def _logits(model: nn.Module, images: Tensor, embeddings: Tensor) -> Tensor:
    return logit_scale(model) * encode_image(model, images) @ embeddings.T
