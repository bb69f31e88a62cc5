"""The command ``vlkr evaluate``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkr.errors import VlkrError
from vlkr.files import check_free

if TYPE_CHECKING:
    from vlkr.evaluation.report import Evaluation


def evaluate(
    model: str | None = None,
    pretrained: str | None = None,
    run: Path | None = None,
    datasets: list[str] | None = None,
    shifts: bool = True,
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
    """Measures a model on its home dataset and under domain shift.

    Args:
        model: for zero-shot: ``tiny``, an open_clip name, ``hf-hub:org/repo``, ``local-dir:/path``.
        pretrained: open_clip's tag or a path of weights.
        run: for an adapted model: a folder written by ``vlkr adapt``.
        datasets: cards' names or folders, the home dataset first; the run's own by default.
        shifts: also measure the shifts that the home dataset's card names.
        unknown: datasets of classes that the home dataset lacks; measures how well confidence
            tells them apart (AUROC).
        reference: ``metrics.json`` of zero-shot evaluations on the same datasets; measures
            effective robustness against their line, or the line from chance to a single one.
        split: which split of each dataset.
        templates: in place of each dataset's own: prompts with ``{c}``, ``imagenet80``,
            ``imagenet7``, a set of the dataset's card, or a file with a prompt a line.
        test_fraction: of a folder without splits, the part that is its test split; by default the
            run's, or 0.5. A run's own home keeps the run's.
        batch_size: images at a time.
        num_workers: processes that decode images; 0 does it in the main one.
        device: ``auto``, ``cpu``, ``cuda``, ...
        devices: processes that share the images; under ``torchrun`` its number counts.
        cache: keep class embeddings, and image features of an image tower without adapters, in
            ``$VLKR_CACHE`` (``~/.cache/vlkr``), within ``$VLKR_CACHE_GB``.
        keep_predictions: write what is said of each image, ``predictions/DATASET.jsonl``.
        max_bad: of each dataset, images that cannot be used are left out, up to so many.
        output: folder for ``metrics.json``, ``report.md``, ``confusion.json`` and
            ``reliability.png``.
        force: write into a folder that holds something.

    Raises:
        VlkrError: for a model, run or dataset that cannot be read.
    """
    from vlkr.datasets import DataOptions, load_dataset
    from vlkr.evaluation.outputs import write_evaluation
    from vlkr.evaluation.robustness import (
        Reference,
        add_effective_robustness,
        check_references,
    )
    from vlkr.evaluation.zero_shot import evaluate_bundle, with_shifts
    from vlkr.models.loading import load_model
    from vlkr.runs import RunFolder, adapter_scale
    from vlkr.runtime import processes, rank

    if (model is None) == (run is None):
        both = "" if model is None else ", not both"
        raise VlkrError(f"evaluate needs either --model NAME or --run DIR{both}")
    if run is not None and pretrained is not None:
        raise VlkrError("--pretrained goes with --model; a run knows its own weights")
    if output is not None:
        check_free(output, force=force)
    references = [Reference(path) for path in reference or []]
    home = None
    context: dict[str, Any] = {}
    if run is not None:
        folder = RunFolder.open(run)
        bundle, data = folder.load_model(), folder.config.data
        context = folder.config.context(adapter_scale(bundle))
        templates = data.templates if templates is None else templates
        test_fraction = data.test_fraction if test_fraction is None else test_fraction
        home = folder.dataset() if datasets is None else None
    else:
        bundle = load_model(str(model), pretrained)
        datasets = datasets or ["digits"]
    test_fraction = DataOptions.test_fraction if test_fraction is None else test_fraction
    loaded = with_shifts(home, datasets or [], shifts, templates, test_fraction)
    if references:
        check_references(references, loaded, split)
    strangers = [load_dataset(name, test_fraction=test_fraction) for name in unknown or []]
    with processes(devices, device) as own_device:
        evaluation = evaluate_bundle(
            bundle,
            loaded,
            split=split,
            batch_size=batch_size,
            num_workers=num_workers,
            device=own_device,
            unknown=strangers,
            keep_predictions=keep_predictions,
            cache=cache,
            max_bad=max_bad,
        )
        is_first = rank() == 0
    evaluation.context |= context
    if references:
        add_effective_robustness(evaluation, references)
    if output is not None and is_first:
        write_evaluation(evaluation, output)
    return evaluation
