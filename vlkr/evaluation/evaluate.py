"""Evaluates a model in-distribution and under domain shift, from images to metrics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import TextColumn
from torch import Tensor, nn

from vlkr.caching import cached_tensors
from vlkr.datasets import DataConfig, Dataset, load_dataset
from vlkr.errors import VlkrError
from vlkr.evaluation.features import EvalModel, evaluation_mode, feature_batches
from vlkr.evaluation.metrics import effective_robustness, measure, open_set_auroc
from vlkr.evaluation.predictions import Predictions, predict
from vlkr.evaluation.report import Evaluation
from vlkr.files import check_free, read_json
from vlkr.models.clip import ClipBundle, logit_scale
from vlkr.models.loading import load_model
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts
from vlkr.runs import RunFolder, adapter_scale
from vlkr.runtime import gather, is_first_process, processes, progress_bar

_TEXTS_PER_BATCH = 256
_NO_TEMPLATES = "none (classes learnt from images)"


def evaluate(
    model: str | None = None,
    pretrained: str | None = None,
    run: Path | None = None,
    datasets: list[str] | None = None,
    include_shifts: bool = True,
    unknown: list[str] | None = None,
    reference: list[Path] | None = None,
    split: str = "test",
    templates: list[str] | None = None,
    test_fraction: float | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    devices: int = 1,
    cache: bool = True,
    keep_predictions: bool = False,
    max_bad: int = 0,
    output: Path | None = None,
    force: bool = False,
) -> Evaluation:
    """Evaluates a model by name or a run folder on datasets by name, as ``vlkr evaluate`` does.

    The options are those of ``vlkr evaluate``, whose help describes them.

    Raises:
        VlkrError: for a model, run or dataset that cannot be read.
    """
    if (model is None) == (run is None):
        both = "" if model is None else ", not both"
        raise VlkrError(f"evaluate needs either --model NAME or --run DIR{both}")
    if run is not None and pretrained is not None:
        raise VlkrError("--pretrained goes with --model; a run knows its own weights")
    if output is not None:
        check_free(output, force=force)
    references = [Reference(path) for path in reference or []]
    first = None
    context: dict[str, Any] = {}
    if run is not None:
        folder = RunFolder.open(run)
        bundle, data = folder.load_model(), folder.config.data
        context = folder.config.context(adapter_scale(bundle))
        templates = data.templates if templates is None else templates
        test_fraction = data.test_fraction if test_fraction is None else test_fraction
        first = folder.dataset() if datasets is None else None
    else:
        bundle = load_model(str(model), pretrained)
        datasets = datasets or ["digits"]
    test_fraction = DataConfig.test_fraction if test_fraction is None else test_fraction
    loaded = with_shifts(first, datasets or [], include_shifts, templates, test_fraction)
    if references:
        check_references(references, loaded, split)
    unknown_datasets = [load_dataset(name, test_fraction=test_fraction) for name in unknown or []]
    with processes(devices, device) as own_device:
        evaluation = evaluate_model(
            bundle,
            loaded,
            split=split,
            batch_size=batch_size,
            num_workers=num_workers,
            device=own_device,
            unknown=unknown_datasets,
            keep_predictions=keep_predictions,
            cache=cache,
            max_bad=max_bad,
        )
        is_first = is_first_process()
    evaluation.context |= context
    if references:
        add_effective_robustness(evaluation, references)
    if output is not None and is_first:
        evaluation.write(output)
    return evaluation


def with_shifts(
    first: Dataset | None,
    names: Sequence[str],
    shifts: bool,
    templates: Sequence[str] | None,
    test_fraction: float,
) -> list[Dataset]:
    """Loads the datasets to evaluate on, the in-distribution one first.

    Args:
        first: the in-distribution dataset; None for the first of ``names``.
        names: card names or folders.
        shifts: add those that the first dataset's card names.
        templates: for all of them, None for each dataset's own.
        test_fraction: fraction held out for testing if a folder has no splits.
    """
    loaded = [] if first is None else [first]
    loaded += [load_dataset(name, test_fraction=test_fraction) for name in names]
    if shifts:
        known = {dataset.name for dataset in loaded}
        more = [name for name in loaded[0].shifts if name not in known]
        loaded += [load_dataset(name, test_fraction=test_fraction) for name in more]
    return [dataset.with_templates(templates) for dataset in loaded]


def evaluate_model(
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
    """Evaluates a loaded model, with or without adapters, on loaded datasets.

    With a torch.distributed process group each process evaluates its share of the images, and all
    of them return the same evaluation.

    Args:
        bundle: the model; its adapters are merged during the evaluation and restored after it.
        datasets: the in-distribution dataset first.
        split: split of each dataset.
        batch_size: images per batch.
        num_workers: processes that decode images.
        device: where to compute.
        unknown: datasets whose images are all of classes that the first dataset does not have.
        keep_predictions: keep per-image predictions, in each result's ``predictions``.
        cache: keep class embeddings, and features of a frozen image tower, on disk.
        max_bad: maximum number of invalid images to skip per dataset.

    Raises:
        VlkrError: for a split that is missing or empty, an image that cannot be read, or logits
            that are not finite.
    """
    for dataset in (*datasets, *unknown):
        dataset.source(split)
    progress = progress_bar(TextColumn("{task.completed} images"))
    embeddings: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    with evaluation_mode(bundle, device) as model, progress:

        def predictions(dataset: Dataset, classes: Dataset) -> Predictions:
            """Classifies a dataset's images into the classes of a possibly different dataset."""
            texts = (classes.class_names, classes.templates)
            if texts not in embeddings:
                embeddings[texts] = dataset_embeddings(model, classes, cache=cache)
            task = progress.add_task(dataset.name, total=dataset.sizes.get(split))
            parts: list[Predictions] = []
            problem: VlkrError | None = None
            try:
                for part in feature_batches(
                    model,
                    dataset.source(split),
                    batch_size,
                    num_workers,
                    cache=cache,
                    max_bad=max_bad,
                    advance=lambda images: progress.advance(task, images),
                ):
                    logits = _logits(model.module, part.features, embeddings[texts])
                    if not logits.isfinite().all():
                        raise VlkrError(
                            f"the model's logits on {dataset.name} are not finite: its training "
                            "diverged, or its weights are damaged"
                        )
                    parts.append(predict(logits, part.labels, part.keys, part.domains))
            except VlkrError as error:
                problem = error
            joined = Predictions.joined(gather(Predictions.joined(parts), problem))
            _check_complete(joined, dataset, split, max_bad)
            return joined

        known = [predictions(dataset, dataset) for dataset in datasets]
        open_set = [predictions(dataset, datasets[0]) for dataset in unknown]
    if bundle.head is not None:
        datasets = [replace(d, template_set=_NO_TEMPLATES) for d in datasets]
    results = [
        measure(predicted, dataset, split, keep=keep_predictions)
        for dataset, predicted in zip(datasets, known, strict=True)
    ]
    context: dict[str, Any] = {
        "model": bundle.name,
        "pretrained": bundle.pretrained,
        "weights_sha256": bundle.weights_hash,
    }
    if unknown:
        results[0].metrics["auroc"] = open_set_auroc(known[0], Predictions.joined(open_set))
        counts = zip(unknown, open_set, strict=True)
        context["unknown"] = " ".join(f"{d.name} ({len(predicted)})" for d, predicted in counts)
    return Evaluation(results, context)


def _check_complete(predictions: Predictions, dataset: Dataset, split: str, max_bad: int) -> None:
    """Raises :class:`VlkrError` for a wrong number of images or for duplicate keys."""
    number = len(predictions)
    expected = dataset.sizes.get(split, number)
    if not number or not expected - max_bad <= number <= expected:
        raise VlkrError(
            f"dataset {dataset.name!r} has {number or 'no'} images in its split {split!r}, "
            f"expected {expected or 'some'}"
        )
    if len(set(predictions.keys)) < number:
        key, times = Counter(predictions.keys).most_common(1)[0]
        raise VlkrError(
            f"dataset {dataset.name!r} has the key {key!r} {times} times in its split {split!r}; "
            "vlkr data verify lists what is wrong"
        )


def dataset_embeddings(model: EvalModel, dataset: Dataset, *, cache: bool) -> Tensor:
    """Returns the model's classifier for a dataset, from its class names and templates.

    Args:
        model: model with a text tower, or with learned class embeddings.
        dataset: dataset whose class names and templates are embedded.
        cache: keep it on disk, keyed by the text tower's weights, the names and the templates.

    Returns:
        ``(num_classes, embed_dim)``, normalized, on the model's device.
    """
    bundle = model.bundle
    if bundle.head is not None:
        learned: Tensor = bundle.head(dataset.class_names)
        return learned.detach().to(model.device)

    def make() -> tuple[dict[str, Tensor], dict[str, str]]:
        prompts = tokenize_prompts(bundle.tokenizer, dataset.class_names, dataset.templates)
        prompts = prompts.to(model.device)
        embeddings = class_embeddings(bundle.model, prompts, chunk=_TEXTS_PER_BATCH)
        return {"embeddings": embeddings}, {"model": bundle.label}

    if not cache:
        return make()[0]["embeddings"]
    key = {
        "weights": model.text_tower_hash,
        "architecture": json.dumps(bundle.model_cfg, sort_keys=True, default=str),
        "class_names": dataset.class_names,
        "templates": dataset.templates,
    }
    tensors, _ = cached_tensors("class_embeddings", key, make)
    return tensors["embeddings"].to(model.device)


def _logits(model: nn.Module, features: Tensor, embeddings: Tensor) -> Tensor:
    """Returns logits on the CPU and in fp64, so that no digit depends on the batch size."""
    scale = logit_scale(model).cpu().double()
    return scale * features.cpu().double() @ embeddings.cpu().double().T


class Reference:
    """Top-1 accuracies of a zero-shot model, read from disk.

    Args:
        path: ``metrics.json`` of ``vlkr evaluate``, or the folder that holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / "metrics.json" if path.is_dir() else path
        content = read_json(self.path)
        try:
            self.label = f"{content['model']} ({content['weights_sha256'][:12]})"
            self._acc1 = {
                (result["dataset"], result["split"]): float(result["metrics"]["acc1"])
                for result in content["results"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise VlkrError(f"{self.path} is not an evaluation of a model: {error}") from error
        if "adapter" in content:
            raise VlkrError(f"{self.path} is from an adapted model; expected a zero-shot one")

    def accuracy(self, dataset: str, split: str) -> float:
        """Returns the accuracy on a split of a dataset; :class:`VlkrError` if there is none."""
        if (dataset, split) not in self._acc1:
            raise VlkrError(f"{self.path} has no result on dataset {dataset!r}, split {split!r}")
        return self._acc1[dataset, split]


def check_references(
    references: Sequence[Reference], datasets: Sequence[Dataset], split: str
) -> None:
    """Raises :class:`VlkrError` unless there is a shift, and the references cover all datasets."""
    if len(datasets) < 2:
        raise VlkrError("effective robustness needs a shift, and there is only one dataset")
    for reference in references:
        for dataset in datasets:
            reference.accuracy(dataset.name, split)


def add_effective_robustness(evaluation: Evaluation, references: Sequence[Reference]) -> None:
    """Adds ``effective_robustness`` to each shift's metrics, and the references to the context.

    With a single zero-shot model the line runs from chance to it.
    """
    first = evaluation.in_distribution
    for shift in evaluation.shifts:
        points = [
            (model.accuracy(first.dataset, first.split), model.accuracy(shift.dataset, shift.split))
            for model in references
        ]
        if len(points) == 1:
            points.append((1 / len(first.class_names), 1 / len(shift.class_names)))
        shift.metrics["effective_robustness"] = effective_robustness(
            first.metrics["acc1"], shift.metrics["acc1"], points
        )
    names = [model.label for model in references] + ["chance"] * (len(references) == 1)
    evaluation.context["effective robustness against"] = " and ".join(names)
