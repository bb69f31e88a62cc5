"""The model card, and the push to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
    try_to_load_from_cache,
)

# Of whichever HTTP library this version of the hub's client is built on.
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from vlkr.errors import VlkrError, printable
from vlkr.evaluation.report import METRICS, format_metric
from vlkr.export.formats import ExportInput, Format, Manifest
from vlkr.export.parity import Parity
from vlkr.files import read_yaml, resource
from vlkr.models.clip import hub_repository
from vlkr.models.names import TINY, is_timm
from vlkr.reporting.table import Table, markdown_text
from vlkr.version import __version__

_MAX_NAMES = 20


def model_card(
    source: ExportInput,
    format: Format,
    manifest: Manifest,
    parity: Parity,
    *,
    command: str,
    folder: str,
    repository: str | None,
) -> str:
    """Returns a ``README.md`` with YAML front matter.

    ``folder`` is the export's name in the lines that load it, ``repository`` its place on the hub.
    """
    folder = printable(folder)
    download = (
        "from huggingface_hub import snapshot_download\n"
        f'snapshot_download("{repository}", local_dir="{folder}")\n'
    )
    snippet = format.snippet.replace("{folder}", folder)
    bundle = source.adapted
    base = _base_name(bundle.name)
    data, card = manifest.data["name"], resource(f"data/{manifest.data['name']}.yaml")
    is_registered = source.config.data.name is not None and card.is_file()
    return _template().render(
        front_matter=_front_matter(source, format, folder, data),
        folder=folder,
        base=base,
        base_and_tag=f"{base} {Path(bundle.pretrained or '').name}".strip(),
        base_licence=base_licence(source),
        data=data,
        data_licence=read_yaml(card).get("licence") if is_registered else None,
        selection=_selection(source),
        adapter=manifest.adapter,
        contents=format.contents(),
        snippet=snippet if repository is None else download + snippet,
        metrics=_metrics(source),
        has_text=bundle.has_text,
        logit_scale=source.classifier.logit_scale,
        manifest=manifest,
        parity=parity.summary(),
        command=command,
        version=__version__,
    )


def _template() -> Template:
    """Returns the template; what it inserts is shown as it is, without tags, links or cells."""
    environment = Environment(
        loader=PackageLoader("vlkr.export", ""),
        autoescape=False,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: (
            value if isinstance(value, Markup) else markdown_text(str(value)).replace("|", "\\|")
        ),
    )
    environment.filters["code"] = lambda text: Markup(text.replace("`", "'"))
    environment.filters["shortened"] = _shortened
    return environment.get_template("card.md.j2")


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _selection(source: ExportInput) -> str:
    """Returns which images a run was trained on: ``16 shots, seed 1``."""
    options = {key: value for key, value in source.config.data.context().items() if value}
    shots = [f"{options.pop('shots')} shots"] if "shots" in options else []
    named = (f"{key} {value}" for key, value in options.items())
    return ", ".join([*shots, *named, f"seed {source.config.seed}"])


def _metrics(source: ExportInput) -> str:
    results = source.results
    if not results:
        return "The run was not evaluated.\n"
    shown = [name for name in METRICS if all(name in r["metrics"] for r in results)]
    rows = [["dataset", "split", "images", *(METRICS[name] for name in shown)]]
    rows += [
        [r["dataset"], r["split"], str(r["images"])]
        + [format_metric(m, r["metrics"][m]) for m in shown]
        for r in results
    ]
    note = "" if source.alpha == 1 else ", not at the strength of this export"
    table = Table.of("", rows).markdown()
    return (
        f"{table}\nOf the adapted model in fp32 at full strength of the adapter{note}; "
        f"{markdown_text(_selection(source))}, templates "
        f"{markdown_text(str(results[0]['templates']))}, final checkpoint.\n"
    )


def _front_matter(source: ExportInput, format: Format, folder: str, data: str) -> str:
    adapter, has_text = source.config.adapter, source.adapted.has_text
    # The metrics are of the run at full strength.
    results = source.results if source.alpha == 1 else []
    card = ModelCardData(
        license=base_licence(source),
        base_model=_base_repository(source),
        library_name=format.library,
        pipeline_tag="zero-shot-image-classification" if has_text else "image-classification",
        tags=["vlkr", adapter.name],
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
        adapter={"name": adapter.name, "options": adapter.options},
    )
    return card.to_yaml() + "\n"


def base_licence(source: ExportInput) -> str | None:
    """Returns the base model's licence from its files, its card or timm; None if unknown."""
    name, pretrained = source.adapted.name, source.adapted.pretrained
    if is_timm(name) and pretrained is None:
        licence = getattr(source.merged.visual, "pretrained_cfg", {}).get("license")
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
        return None  # no card, or an unreadable one
    return None if licence is None else str(licence)


def _base_name(name: str) -> str:
    """Returns a model's name without the folders of this machine."""
    own = name.removeprefix("timm:")
    return Path(name).name if own.startswith(("local-dir:", "/")) else name


def _base_repository(source: ExportInput) -> str | None:
    """Returns the base model's name on the hub, None for one that cannot be there."""
    name, pretrained = source.adapted.name, source.adapted.pretrained
    if not is_timm(name):
        name = hub_repository(name, pretrained) or _base_name(name)
    elif name.startswith(("timm:local-dir:", "timm:hf-hub:")):
        name = _base_name(name).removeprefix("timm:hf-hub:")
    else:
        name = name.replace(":", "/", 1)
    return name if is_repository(name) else None


def is_repository(name: str) -> bool:
    """Returns whether a name could be a repository's on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_repository(repository: str) -> None:
    """Raises :class:`VlkrError` for an invalid name, or if there is no token to push with."""
    if not is_repository(repository):
        raise VlkrError(f"{repository!r} is not a repository, expected ORG/NAME")
    if get_token() is None:
        raise VlkrError("no token to push to the hub with: set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, repository: str) -> str:
    """Uploads a folder as one commit, to a new repository if there is none; returns its address."""
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by vlkr")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise VlkrError(
            f"wrote {folder}, but could not push it to {repository}: {reason}"
        ) from error
    return str(address)
