"""Zero-shot classification: metrics of a model, adapted or not, on datasets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich.progress import TextColumn
from torch import Tensor, nn

from vlkr.caching import cached_tensors
from vlkr.datasets import Dataset, load_dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.features import Measured, feature_batches, measured
from vlkr.evaluation.metrics import (
    classification_metrics,
    confusion_matrix,
    domain_accuracy,
    reliability,
    unknown_auroc,
    worst_confusions,
)
from vlkr.evaluation.predictions import Predictions, predict
from vlkr.evaluation.report import DatasetResult, Evaluation
from vlkr.models.clip import ClipBundle, logit_scale
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts
from vlkr.runtime import gather, progress_bar

_TEXTS_AT_A_TIME = 256
_NO_TEMPLATES = "none (classes learnt from images)"


def with_shifts(
    home: Dataset | None,
    names: Sequence[str],
    shifts: bool,
    templates: Sequence[str] | None,
    test_fraction: float,
) -> list[Dataset]:
    """Loads the datasets to evaluate on, the in-distribution one first.

    Args:
        home: the in-distribution dataset; None for the first of ``names``.
        names: card names or folders.
        shifts: add those that its card names.
        templates: for all of them, None for each dataset's own.
        test_fraction: of folders without splits.
    """
    loaded = [] if home is None else [home]
    loaded += [load_dataset(name, test_fraction=test_fraction) for name in names]
    if shifts:
        known = {dataset.name for dataset in loaded}
        others = [name for name in loaded[0].shifts if name not in known]
        loaded += [load_dataset(name, test_fraction=test_fraction) for name in others]
    return [dataset.with_templates(templates) for dataset in loaded]


def evaluate_bundle(
    bundle: ClipBundle,
    datasets: Sequence[Dataset],
    *,
    split: str = "test",
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    unknown: Sequence[Dataset] = (),
    keep_predictions: bool = False,
    cache: bool = False,
    max_bad: int = 0,
) -> Evaluation:
    """Measures a loaded model, with or without adapters, on loaded datasets.

    Where torch.distributed is at work each process takes its share of the images, and all of
    them return the same.

    Args:
        bundle: the model; its adapters are merged while it is measured and come off again.
        datasets: the home dataset first.
        split: which split of each.
        batch_size: images at a time.
        num_workers: processes that decode images.
        device: where to compute.
        unknown: datasets whose images are all of classes that the home dataset does not have.
        keep_predictions: keep what is said of each image, in each result's ``predictions``.
        cache: keep class embeddings, and image features of a frozen image tower, on disk.
        max_bad: of each dataset, images that cannot be used are left out, up to so many.

    Raises:
        VlkrError: for a split that is missing or empty, an image that cannot be read, or logits
            that are not finite.
    """
    for dataset in (*datasets, *unknown):
        dataset.source(split)
    progress = progress_bar(TextColumn("{task.completed} images"))
    embedded: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    with measured(bundle, device) as subject, progress:

        def predictions(dataset: Dataset, classes: Dataset) -> Predictions:
            """Of a dataset's images, in the classes of another."""
            texts = (classes.class_names, classes.templates)
            if texts not in embedded:
                embedded[texts] = dataset_embeddings(subject, classes, cache=cache)
            task = progress.add_task(dataset.name, total=dataset.sizes.get(split))
            parts: list[Predictions] = []
            problem: VlkrError | None = None
            try:
                for part in feature_batches(
                    subject,
                    dataset.source(split),
                    batch_size,
                    num_workers,
                    cache=cache,
                    max_bad=max_bad,
                    advance=lambda images: progress.advance(task, images),
                ):
                    logits = _logits(subject.model, part.features, embedded[texts])
                    if not logits.isfinite().all():
                        raise VlkrError(
                            f"the model's logits on {dataset.name} are not finite: its training "
                            "diverged, or its weights are damaged"
                        )
                    parts.append(predict(logits, part.labels, part.keys, part.domains))
            except VlkrError as error:
                problem = error
            found = Predictions.joined(gather(Predictions.joined(parts), problem))
            expected = dataset.sizes.get(split, len(found))
            if not len(found) or not expected - max_bad <= len(found) <= expected:
                raise VlkrError(
                    f"dataset {dataset.name!r} has {len(found) or 'no'} images in its split "
                    f"{split!r}, expected {expected or 'some'}"
                )
            _check_keys(dataset, split, found)
            return found

        said = [predictions(dataset, dataset) for dataset in datasets]
        strange = [predictions(dataset, datasets[0]) for dataset in unknown]
    if bundle.head is not None:
        datasets = [replace(d, template_set=_NO_TEMPLATES) for d in datasets]
    results = [
        dataset_result(dataset, split, found, keep_predictions)
        for dataset, found in zip(datasets, said, strict=True)
    ]
    if strange:
        results[0].metrics["auroc"] = unknown_auroc(said[0], Predictions.joined(strange))
    context = {
        "model": bundle.name,
        "pretrained": bundle.pretrained,
        "weights_sha256": bundle.weights_hash,
    }
    if unknown:
        context["unknown"] = " ".join(
            f"{dataset.name} ({len(found)})"
            for dataset, found in zip(unknown, strange, strict=True)
        )
    return Evaluation(results, context)


def _check_keys(dataset: Dataset, split: str, found: Predictions) -> None:
    """That none comes twice, which readers of some tars each cannot see."""
    if len(set(found.keys)) < len(found):
        key, times = Counter(found.keys).most_common(1)[0]
        raise VlkrError(
            f"dataset {dataset.name!r} has the key {key!r} {times} times in its split {split!r}; "
            "vlkr data verify lists what is wrong"
        )


def dataset_embeddings(subject: Measured, dataset: Dataset, *, cache: bool) -> Tensor:
    """The classifier that a model has for a dataset: class embeddings from names and templates.

    Args:
        subject: the model.
        dataset: class names and templates.
        cache: read and keep them on disk, under the text tower's weights, names and templates.

    Returns:
        ``(num_classes, embed_dim)``, normalised, on the model's device.
    """
    bundle = subject.bundle
    if bundle.head is not None:
        learnt: Tensor = bundle.head(dataset.class_names)
        return learnt.detach().to(subject.device)

    def make() -> tuple[dict[str, Tensor], dict[str, str]]:
        prompts = tokenize_prompts(bundle.tokenizer, dataset.class_names, dataset.templates)
        prompts = prompts.to(subject.device)
        embeddings = class_embeddings(bundle.model, prompts, chunk=_TEXTS_AT_A_TIME)
        return {"embeddings": embeddings}, {"model": bundle.label}

    if not cache:
        return make()[0]["embeddings"]
    key = {
        "weights": subject.text_tower_hash,
        "architecture": json.dumps(bundle.model_cfg, sort_keys=True, default=str),
        "class_names": dataset.class_names,
        "templates": dataset.templates,
    }
    return cached_tensors("class_embeddings", key, make)[0]["embeddings"].to(subject.device)


def _logits(model: nn.Module, features: Tensor, embeddings: Tensor) -> Tensor:
    """On the CPU and in fp64: no digit depends on how many images are multiplied at a time."""
    scale = logit_scale(model).cpu().double()
    return scale * features.cpu().double() @ embeddings.cpu().double().T


def dataset_result(
    dataset: Dataset, split: str, predictions: Predictions, keep_predictions: bool
) -> DatasetResult:
    """What predictions on a split of a dataset amount to."""
    num_classes = len(dataset.class_names)
    metrics = classification_metrics(predictions, num_classes)
    confusion = confusion_matrix(predictions, num_classes)
    domains = domain_accuracy(predictions, dataset.domains) if dataset.domains else {}
    if len(domains) > 1:
        accuracies = [domain.acc1 for domain in domains.values()]
        metrics["mean_domain_acc1"] = round(sum(accuracies) / len(accuracies), 6)
        metrics["worst_domain_acc1"] = min(accuracies)
    return DatasetResult(
        dataset.name,
        split,
        len(predictions),
        dataset.template_set,
        metrics,
        domains,
        reliability(predictions),
        worst_confusions(confusion, dataset.class_names),
        dataset.class_names,
        confusion.tolist(),
        predictions if keep_predictions else None,
    )
