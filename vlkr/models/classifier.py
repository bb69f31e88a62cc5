"""Class embeddings that are learned from images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkr.errors import VlkrError
from vlkr.files import atomic_file


class ClassHead(nn.Module):
    """Cosine classifier of a model without text.

    It is initialized to the classes' mean features, as in prototypical networks (Snell et al.,
    2017), and trained with the adapters.

    Args:
        class_names: one per class.
        embed_dim: size of the image features.

    Attributes:
        weight: ``(num_classes, embed_dim)``, of any length.
    """

    def __init__(self, class_names: Sequence[str], embed_dim: int) -> None:
        super().__init__()
        self.class_names = tuple(class_names)
        self.weight = nn.Parameter(torch.zeros(len(class_names), embed_dim))

    def forward(self, class_names: Sequence[str] | None = None) -> Tensor:
        """Returns normalized embeddings ``(num_classes, embed_dim)`` of all classes or those named.

        Raises:
            VlkrError: for a class that was not learned.
        """
        embeddings = F.normalize(self.weight, dim=-1)
        if class_names is None or tuple(class_names) == self.class_names:
            return embeddings
        for name in class_names:
            if name not in self.class_names:
                raise VlkrError(
                    f"class {name!r} was not learned, and a model without text knows only "
                    f"{', '.join(self.class_names[:5])}{', ...' * (len(self.class_names) > 5)}"
                )
        return embeddings[[self.class_names.index(name) for name in class_names]]

    @torch.no_grad()
    def start(self, features: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Sets each class's embedding to the mean feature of its images.

        Args:
            features: batches of normalized features ``(batch, embed_dim)`` and labels ``(batch)``.
        """
        total = torch.zeros_like(self.weight)
        for batch, labels in features:
            total.index_add_(0, labels, batch.float())
        self.weight.copy_(F.normalize(total, dim=-1))

    def save(self, path: Path) -> None:
        """Writes weight and class names as safetensors."""
        names = {"class_names": json.dumps(self.class_names)}  # one, for their order is random
        with atomic_file(path) as temporary:
            save_file({"weight": self.weight.detach().cpu()}, temporary, names)

    @classmethod
    def load(cls, path: Path) -> ClassHead:
        """Reads what :meth:`save` wrote.

        Raises:
            VlkrError: if the file is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                class_names = json.loads((file.metadata() or {})["class_names"])
                weight = file.get_tensor("weight")
            head = cls(class_names, weight.shape[1])
            head.load_state_dict({"weight": weight})
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, IndexError) as error:
            raise VlkrError(f"cannot read class embeddings {path}: {error}") from error
        return head
