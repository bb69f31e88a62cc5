"""The command ``vlkr project``: the adapter that is nearest to a full fine-tune.

Heavy imports wait until it runs, so that help is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlkr.config import AdapterConfig
from vlkr.errors import VlkrError
from vlkr.files import check_free
from vlkr.reporting.table import Table

if TYPE_CHECKING:
    from vlkr.adapters import Projected


@dataclass
class ProjectResult:
    """A projected fine-tune.

    Attributes:
        output: the adapter folder.
        layers: each weight's change and the adapter's error.
        context: what the numbers depend on.
    """

    output: Path
    layers: list[Projected]
    context: dict[str, Any]

    @property
    def error(self) -> float:
        """Root mean square of the layers' errors, relative to their changes, unweighted."""
        return math.sqrt(sum(layer.error**2 for layer in self.layers) / len(self.layers))

    def to_json(self) -> dict[str, Any]:
        """Context and layers."""
        layers = [
            {"layer": p.target.path, "change": p.delta_norm, "error": p.error} for p in self.layers
        ]
        return {**self.context, "output": str(self.output), "error": self.error, "layers": layers}

    def show(self, console: Console) -> None:
        """Prints the table and where the adapter lies."""
        rows = [["layer", "change / weight", "error / change"]]
        rows += [[p.target.path, f"{p.delta_norm:.4f}", f"{p.error:.4f}"] for p in self.layers]
        rows.append(["root mean square", "", f"{self.error:.4f}"])
        console.print(Table.of("Relative Frobenius norms", rows).rich())
        context = ", ".join(f"{key} {value}" for key, value in self.context.items())
        console.print(context, style="dim", highlight=False, markup=False)
        console.print(f"Adapter: {self.output}", highlight=False, markup=False)


def project_fine_tune(
    output: Path,
    base: str,
    tuned: str,
    base_pretrained: str | None = None,
    tuned_pretrained: str | None = None,
    adapter: AdapterConfig = AdapterConfig(),
    force: bool = False,
) -> ProjectResult:
    """Finds the adapter that is nearest to a full fine-tune and writes it as an adapter folder.

    KRAdapter's is the truncated SVD of each row, LoRA's that of the matrix. What the fine-tune
    changed elsewhere (norms, embeddings, biases) is left out.

    Args:
        output: the adapter folder to write.
        base: the base model, named as for ``vlkr adapt``.
        tuned: the fine-tuned model.
        base_pretrained: open_clip's tag or a path of weights of the base.
        tuned_pretrained: likewise of the fine-tuned model.
        adapter: method (``kradapter`` or ``lora``), its options and targets.
        force: replace what is there.

    Raises:
        VlkrError: if a model cannot be read, or the two differ in shape.
    """
    from vlkr.adapters import project_model, save_adapter
    from vlkr.models.loading import load_model

    if adapter.match is not None:
        raise VlkrError("adapter.match does not go with project; adapter.options choose the size")
    check_free(output, force=force)
    first, second = load_model(base, base_pretrained), load_model(tuned, tuned_pretrained)
    layers = project_model(
        first.model, second.model.state_dict(), adapter.name, **adapter.place(), **adapter.options
    )
    save_adapter(first.model, output, base_model=first.label, force=force)
    context = {
        "base": first.label,
        "tuned": second.label,
        "adapter": adapter.name,
        "options": adapter.options,
    }
    return ProjectResult(output, layers, context)
