"""Datasets by name or by path: class names, templates and splits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from vlkr.datasets.sources import FolderSource, ShardSource, Source, image_files
from vlkr.errors import VlkrError
from vlkr.files import resource

DEFAULT_TEMPLATES = ("a photo of a {c}.",)
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before an image is read.

    Attributes:
        name: the card's, or the folder's.
        class_names: by label.
        templates: prompts with the placeholder ``{c}``.
        splits: sources by ``"train"``, ``"val"``, ``"test"``.
        template_set: where the templates come from, for captions.
        shifts: names of the datasets that shift this one's domain.
        sizes: images per split, where the card tells.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    splits: Mapping[str, Source]
    template_set: str
    shifts: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    def source(self, split: str) -> Source:
        """The samples of a split.

        Raises:
            VlkrError: if the dataset has no such split.
        """
        if split not in self.splits:
            raise VlkrError(
                f"dataset {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        return self.splits[split]


def load_dataset(
    reference: str | Path,
    *,
    templates: tuple[str, ...] | None = None,
    test_fraction: float = 0.5,
) -> Dataset:
    """Finds a dataset.

    Args:
        reference: a card's name (``"digits"``, as a string); a folder of webdataset shards with
            ``classnames.txt``; or a folder of images, ``<class>/*`` or ``<split>/<class>/*``.
        templates: prompts to use in place of the dataset's own.
        test_fraction: of a folder without splits, the part that is held out as its test split.
            Which images those are depends on their names alone.

    Raises:
        VlkrError: for an unknown name, a path that is missing, or a card that is not valid.
    """
    if not 0 < test_fraction < 1:
        raise VlkrError(f"test fraction {test_fraction} is out of range, expected between 0 and 1")
    cards = {path.stem: path for path in sorted(resource("data").glob("*.yaml"))}
    folder = Path(reference)
    if isinstance(reference, str) and reference in cards:
        dataset = _from_card(cards[str(reference)])
    elif (folder / "classnames.txt").is_file():
        dataset = _from_shards(folder)
    elif folder.is_dir():
        dataset = _from_folder(folder, test_fraction)
    else:
        near = difflib.get_close_matches(str(reference), cards, n=3)
        known = f"did you mean {', '.join(near)}?" if near else f"cards: {', '.join(sorted(cards))}"
        raise VlkrError(f"no dataset {str(reference)!r}: neither a folder nor a card; {known}")
    if len(dataset.class_names) < 2:
        raise VlkrError(f"dataset {dataset.name!r} has one class only, expected two or more")
    if templates is None:
        return dataset
    check_templates(templates)
    return replace(dataset, templates=templates, template_set=f"given ({len(templates)})")


def check_templates(templates: tuple[str, ...]) -> None:
    """Raises :class:`VlkrError` unless every template has the placeholder ``{c}``."""
    if not templates:
        raise VlkrError("the list of templates is empty, expected e.g. 'a photo of a {c}.'")
    for template in templates:
        if "{c}" not in template:
            raise VlkrError(f"template {template!r} lacks the placeholder {{c}}")


def _from_card(path: Path) -> Dataset:
    try:
        card = yaml.safe_load(path.read_text(encoding="utf-8"))
        folder = path.parent / card["shards"]
        class_names = tuple(str(name) for name in card["class_names"])
        templates = tuple(str(template) for template in card["templates"])
        sizes = {str(split): int(size) for split, size in card["splits"].items()}
        shifts = tuple(str(name) for name in card.get("shifts", ()))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise VlkrError(f"card {path} is not valid: {type(error).__name__} {error}") from error
    check_templates(templates)
    splits = {split: ShardSource(folder / split, len(class_names)) for split in sizes}
    template_set = f"{path.stem} card ({len(templates)})"
    return Dataset(path.stem, class_names, templates, splits, template_set, shifts, sizes)


def _from_shards(folder: Path) -> Dataset:
    class_names = _lines(folder / "classnames.txt")
    if not class_names:
        raise VlkrError(f"{folder / 'classnames.txt'} is empty, expected a class name a line")
    template_file = folder / "zeroshot_classification_templates.txt"
    templates = _lines(template_file) if template_file.is_file() else DEFAULT_TEMPLATES
    check_templates(templates)
    splits = {
        split: ShardSource(folder / split, len(class_names))
        for split in _SPLITS
        if (folder / split).is_dir()
    }
    if not splits:
        raise VlkrError(f"no split in {folder}, expected folders {', '.join(_SPLITS)}")
    return Dataset(folder.name, class_names, templates, splits, f"{folder.name} ({len(templates)})")


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VlkrError(f"cannot read {path}: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _from_folder(root: Path, test_fraction: float) -> Dataset:
    split_roots = {split: root / split for split in _SPLITS if (root / split).is_dir()}
    first = next(iter(split_roots.values()), root)
    classes = tuple(sorted(p.name for p in first.iterdir() if p.is_dir() and p.name[0] != "."))
    if not classes:
        raise VlkrError(f"no class folders in {first}, expected {first}/<class>/<image>")
    splits: dict[str, Source]
    if split_roots:
        for path in split_roots.values():
            other = {p.name for p in path.iterdir() if p.is_dir() and p.name[0] != "."}
            if other != set(classes):
                odd = sorted(other ^ set(classes))[0]
                raise VlkrError(f"class {odd!r} is not in every split of {root}")
        splits = {split: FolderSource(path, classes) for split, path in split_roots.items()}
    else:
        splits = {
            "train": FolderSource(root, classes, held_out=False, fraction=test_fraction),
            "test": FolderSource(root, classes, held_out=True, fraction=test_fraction),
        }
    for name in classes:
        if not image_files(first / name):
            raise VlkrError(f"class {name!r} is empty: no image in {first / name}")
    names = tuple(name.replace("_", " ") for name in classes)
    return Dataset(root.name, names, DEFAULT_TEMPLATES, splits, "default (1)")
