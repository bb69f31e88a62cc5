"""The model card: what was exported, from what, how good it is and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from vlkr.evaluation.report import METRICS, cell, markdown_table
from vlkr.evaluation.runs import run_options
from vlkr.export.formats import Description, Subject
from vlkr.export.hub import is_repository
from vlkr.export.parity import Parity
from vlkr.files import read_json, read_yaml, resource
from vlkr.models.clip import ClipBundle, hub_repository
from vlkr.models.names import TINY, is_timm
from vlkr.version import __version__

_MOST_NAMES = 20


def model_card(
    subject: Subject,
    description: Description,
    parity: Parity,
    *,
    dtype: str,
    command: str,
    folder: str,
    repository: str | None,
) -> str:
    """A ``README.md`` with YAML front matter.

    Args:
        subject: the adapted model.
        description: of the format.
        parity: what the check found.
        dtype: of the weights.
        command: that wrote the export.
        folder: name of the export, for the lines that load it.
        repository: on the hub, if the export goes there.
    """
    adapter = subject.config["adapter"]["name"]
    base, data = _last_part(subject.adapted.name), dataset_name(subject.config)
    download = (
        "from huggingface_hub import snapshot_download\n"
        f'snapshot_download("{repository}", local_dir="{folder}")\n'
    )
    load = description.snippet.replace("{folder}", folder)
    return (
        f"---\n{_front_matter(subject, description, folder)}---\n\n# {folder}\n\n"
        f"{base}, adapted to {data} with {adapter} by vlkr {__version__}. {description.contents}\n"
        f"\n```python\n{download if repository else ''}{load}```\n\n"
        "`class_embeddings.safetensors` holds the classifier that `vlkr predict --model "
        f"{folder} IMAGES` uses.\n\n## Metrics\n\n{_metrics_table(subject)}\n"
        f"## Made from\n\n{markdown_table(_facts(subject, parity, dtype))}\n"
        f"```bash\n{command}\n```\n"
    )


def dataset_name(config: dict[str, Any]) -> str:
    """Of a run's data."""
    return run_options(config).label


def base_licence(subject: Subject) -> str | None:
    """Licence of the base model, where its own files, its card or timm tell; None elsewhere."""
    name, pretrained = subject.adapted.name, subject.adapted.pretrained
    if is_timm(name) and pretrained is None:
        licence = getattr(subject.plain.visual, "pretrained_cfg", {}).get("license")
        return None if licence is None else str(licence)
    if pretrained == "openai":
        return "mit"
    folder = resource("models/tiny_clip") if name == TINY else Path(name.removeprefix("local-dir:"))
    repository = hub_repository(name, pretrained)
    cached = None if repository is None else try_to_load_from_cache(repository, "README.md")
    card = Path(cached) if isinstance(cached, str) else folder / "README.md"
    try:
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, yaml.YAMLError):
        return None  # no card, or none that can be read
    return None if licence is None else str(licence)


def _last_part(name: str) -> str:
    """A model's name without the folders of this machine."""
    own = name.removeprefix("timm:")
    return Path(name).name if own.startswith(("local-dir:", "/")) else name


def _base_repository(bundle: ClipBundle) -> str | None:
    """The base model as hubs name it; None for a name that is none there."""
    name = bundle.name
    if not is_timm(name):
        name = hub_repository(name, bundle.pretrained) or _last_part(name)
    elif name.startswith(("timm:local-dir:", "timm:hf-hub:")):
        name = _last_part(name).removeprefix("timm:hf-hub:")
    else:
        name = name.replace(":", "/", 1)
    return name if is_repository(name) else None


def _front_matter(subject: Subject, description: Description, folder: str) -> str:
    config, bundle = subject.config, subject.adapted
    data, task = dataset_name(config), "zero-shot-image-classification"
    # The run was measured at full strength.
    results = _results(subject) if subject.alpha == 1 else []
    facts = ModelCardData(
        license=base_licence(subject),
        base_model=_base_repository(bundle),
        library_name=description.library,
        pipeline_tag=task if bundle.has_text else "image-classification",
        tags=["vlkr", config["adapter"]["name"]],
        datasets=[data] if is_repository(data) else None,
        metrics=["accuracy"] if results else None,
        model_name=folder if results else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=result["dataset"],
                dataset_name=result["dataset"],
                dataset_split=result["split"],
                metric_type="accuracy",
                metric_name="top-1",
                metric_value=result["metrics"]["acc1"],
            )
            for result in results
        ]
        or None,
        adapter={"name": config["adapter"]["name"], "options": config["adapter"]["options"]},
    )
    return facts.to_yaml() + "\n"


def _results(subject: Subject) -> list[dict[str, Any]]:
    path = subject.run / "metrics.json"
    results: list[dict[str, Any]] = read_json(path)["results"] if path.is_file() else []
    return results


def _metrics_table(subject: Subject) -> str:
    results = _results(subject)
    if not results:
        return "The run was not measured.\n"
    shown = [name for name in METRICS if all(name in r["metrics"] for r in results)]
    rows = [["dataset", "split", "images", *(METRICS[name] for name in shown)]]
    rows += [
        [r["dataset"], r["split"], str(r["images"])] + [cell(m, r["metrics"][m]) for m in shown]
        for r in results
    ]
    note = "" if subject.alpha == 1 else ", not at the strength of this export"
    return (
        f"{markdown_table(rows)}\nOf the adapted model in fp32 at full strength of the adapter"
        f"{note}; {_drawn(subject.config)}, templates "
        f"{results[0]['templates']}, checkpoint last iteration.\n"
    )


def _facts(subject: Subject, parity: Parity, dtype: str) -> list[list[str]]:
    config, bundle, head = subject.config, subject.adapted, subject.classifier
    adapter, data = config["adapter"], dataset_name(config)
    card = resource(f"data/{data}.yaml")
    is_known = config["data"]["name"] is not None and card.is_file()
    data_licence = read_yaml(card).get("licence") if is_known else None
    preprocessing = subject.preprocessing.to_json()
    return [
        ["", "value"],
        ["base model", f"{_last_part(bundle.name)} {Path(bundle.pretrained or '').name}".strip()],
        ["base weights, SHA-256", bundle.weights_hash],
        ["base licence", base_licence(subject) or "not known; see the base model"],
        ["adapter", f"{adapter['name']} {adapter['options'] or ''}".strip()],
        ["adapter's strength (alpha)", f"{subject.alpha:g}"],
        ["data", f"{data}, {_drawn(config)}"],
        ["data licence", data_licence or "not known"],
        ["classes", _listed(head.class_names)],
        ["prompts", _listed(head.templates) if bundle.has_text else "none, learnt from images"],
        ["logit scale", f"{head.logit_scale:.4f}"],
        ["dtype of the weights", dtype],
        ["preprocessing", ", ".join(f"{key} {value}" for key, value in preprocessing.items())],
        ["agreement with the adapted model", parity.summary()],
    ]


def _drawn(config: dict[str, Any]) -> str:
    """Which images a run was trained on: ``16 shots, seed 1``."""
    known = {key: value for key, value in run_options(config).context().items() if value}
    shots = [f"{known.pop('shots')} shots"] if "shots" in known else []
    return ", ".join([*shots, *(f"{k} {v}" for k, v in known.items()), f"seed {config['seed']}"])


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
