from __future__ import annotations

from torch import nn

from vlkr.models.clip import ClipBundle, clip_shapes, load_clip
from vlkr.models.names import is_timm


def load_model(name: str, pretrained: str | None = None) -> ClipBundle:
    """Loads a CLIP model, or a timm model's image encoder where the name begins with ``timm:``.

    Args:
        name: as for :func:`~vlkr.models.clip.load_clip` or :func:`~vlkr.models.timm.load_vit`.
        pretrained: open_clip's tag, or a path of weights.

    Raises:
        VlkrError: for a model that is unknown or cannot be read.
    """
    if is_timm(name):
        from vlkr.models.timm import load_vit

        return load_vit(name, pretrained)
    return load_clip(name, pretrained)


def load_shapes(name: str) -> nn.Module:
    """Returns the architecture without weights, on the meta device, to count parameters with.

    Args:
        name: as for :func:`load_model`.

    Raises:
        VlkrError: for a model that is unknown, or known only to the hub.
    """
    if is_timm(name):
        from vlkr.models.timm import vit_shapes

        return vit_shapes(name)
    return clip_shapes(name)
