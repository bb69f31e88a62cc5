from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from vlkr.adapters import merge_adapters
from vlkr.errors import VlkrError
from vlkr.evaluation.runs import load_run, run_dataset
from vlkr.export.parity import Parity, check_parity
from vlkr.files import atomic_folder, check_free, write_json
from vlkr.models.clip import load_clip, save_open_clip_folder

_CARD = "vlkr_export.json"


@dataclass(frozen=True)
class ExportResult:
    """A written export.

    Attributes:
        folder: where it is.
        parity: how near its features are to the adapted model's.
    """

    folder: Path
    parity: Parity

    def to_json(self) -> dict[str, Any]:
        """Folder and agreement."""
        return {"folder": str(self.folder), "parity": self.parity.to_json()}

    def show(self, console: Console) -> None:
        """Prints where the export is and how near it comes to the adapted model."""
        console.print(
            f"Exported to [bold]{escape(str(self.folder))}[/]. Loaded again and compared on "
            f"{self.parity.images} test images: least cosine of image features "
            f"{self.parity.min_image_cosine:.6f}, of class embeddings "
            f"{self.parity.min_text_cosine:.6f}, same predictions "
            f"{self.parity.same_predictions:.0%}.",
            highlight=False,
        )


def export(run: Path, output: Path, force: bool = False) -> ExportResult:
    """Writes a run's adapted model as a plain open_clip folder, which needs no vlkr.

    ``open_clip.create_model_and_transforms("local-dir:OUTPUT")`` loads it. The adapters are merged
    in fp32. The export is loaded again and compared with the adapted model on test images before
    it gets its name.

    Args:
        run: written by ``vlkr adapt``.
        output: the folder to write.
        force: replace what is there.

    Raises:
        VlkrError: if the run cannot be read, ``output`` exists, or the export differs.
    """
    check_free(output, force=force)
    if output.is_dir() and any(output.iterdir()) and not (output / _CARD).is_file():
        raise VlkrError(f"{output} holds no export; --force replaces nothing else")
    bundle, config = load_run(run)
    dataset = run_dataset(config)
    plain = deepcopy(bundle.model)
    merge_adapters(plain)
    with atomic_folder(output, force=force) as temporary:
        save_open_clip_folder(bundle, temporary, plain.state_dict())
        reloaded = load_clip(f"local-dir:{temporary}")
        parity = check_parity(bundle, reloaded, dataset)
        write_json(
            temporary / _CARD,
            {
                "base_model": bundle.name,
                "base_pretrained": bundle.pretrained,
                "base_sha256": bundle.weights_hash,
                "weights_sha256": reloaded.weights_hash,
                "adapter": config["adapter"],
                "parity": parity.to_json(),
            },
        )
    return ExportResult(output, parity)
