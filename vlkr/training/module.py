from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import Parameter
from torchmetrics.classification import MulticlassAccuracy

from vlkr.adapters import ComposedWeightCache, adapter_parameters
from vlkr.adapters.hosts import adapter_layers, is_adapter_key
from vlkr.config import OptimizerConfig
from vlkr.datasets.epochs import TrainLoader
from vlkr.datasets.loading import Batch
from vlkr.errors import VlkrError
from vlkr.models.clip import ClipBundle, encode_image, logit_scale
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts

_MAX_LOGIT_SCALE = 10_000


def trained_parameters(model: nn.Module, head: nn.Module | None) -> list[Parameter]:
    """Returns what a run trains: a model's adapters and its class head, if there is one."""
    return [*adapter_parameters(model), *([] if head is None else head.parameters())]


class FewShotModule(L.LightningModule):
    """Trains a model's adapters by cross-entropy between image features and class embeddings.

    The class embeddings are recomputed at every step when the text tower carries adapters, and
    once otherwise. Checkpoints hold the adapters and the optimizer, never the base weights.

    Args:
        bundle: a model with adapters.
        class_names: class names, by label.
        templates: prompt templates with the placeholder ``{c}``.
        optimizer: optimizer options.
        seed: random seed of dropout and of the classes of a step.
        classes_per_step: maximum classes per step: those of the batch plus randomly sampled
            ones, which bounds the text tower's work; None for all classes.

    Raises:
        VlkrError: for a logit scale out of range.
    """

    def __init__(
        self,
        bundle: ClipBundle,
        class_names: tuple[str, ...],
        templates: tuple[str, ...],
        optimizer: OptimizerConfig,
        seed: int,
        classes_per_step: int | None = None,
    ) -> None:
        super().__init__()
        scale = float(logit_scale(bundle.model))
        if not 0 < scale <= _MAX_LOGIT_SCALE:
            raise VlkrError(
                f"the logit scale of {bundle.name!r} is {scale:.4g}, expected above 0 and at most "
                f"{_MAX_LOGIT_SCALE:g}; CLIP's is at most 100"
            )
        self.strict_loading = False
        self.model = bundle.model
        self.base_hash = bundle.weights_hash
        self.optimizer_options = optimizer
        self.seed = seed
        self.classes_per_step = classes_per_step
        self.composed_weights = ComposedWeightCache(bundle.model)
        self.steps_next = True
        self.step_keys: list[str] = []
        self.loader_state: dict[str, int] | None = None
        self.prompts: Tensor
        self.embeddings: Tensor
        self.head = bundle.head
        prompts = (
            tokenize_prompts(bundle.tokenizer, class_names, templates)
            if self.head is None
            else torch.empty(len(class_names), 0)
        )
        self.register_buffer("prompts", prompts, persistent=False)
        self.register_buffer("embeddings", torch.empty(0), persistent=False)
        self.adapted_towers = {
            "visual" if path.startswith("visual") else "text"
            for path, _ in adapter_layers(bundle.model)
        }
        self.val_accuracy = MulticlassAccuracy(num_classes=len(class_names), average="micro")

    def on_fit_start(self) -> None:
        """Encodes the prompts once, for a text tower without adapters."""
        if self.head is None and "text" not in self.adapted_towers:
            with torch.no_grad():
                self.embeddings = class_embeddings(self.model, self.prompts)

    def on_train_start(self) -> None:
        """Resumes in mid-epoch, where Lightning does not call ``on_train_epoch_start``."""
        self.on_train_epoch_start()
        if self.loader_state is not None:  # made before Lightning read the checkpoint
            self._loader().load_state_dict(self.loader_state)

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """Returns the logits of images for all classes, or for those given.

        Args:
            images: ``(batch, 3, height, width)``, normalized as the model expects.
            classes: labels ``(num_chosen)``, None for all.

        Returns:
            ``(batch, num_classes)`` or ``(batch, num_chosen)``.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and "visual" in self.adapted_towers):
            features = encode_image(self.model, images)
        if self.head is not None:
            embeddings = cast(Tensor, self.head())
            embeddings = embeddings if classes is None else embeddings[classes]
        elif "text" in self.adapted_towers:
            prompts = self.prompts if classes is None else self.prompts[classes]
            embeddings = class_embeddings(self.model, prompts)
        else:
            embeddings = self.embeddings if classes is None else self.embeddings[classes]
        return logit_scale(self.model) * features @ embeddings.T

    def trained_parameters(self) -> list[Parameter]:
        """Returns the parameters of the adapters and of the class head, if there is one."""
        return trained_parameters(self.model, self.head)

    def _choose_classes(self, labels: Tensor) -> Tensor | None:
        """Returns the batch's classes and random further ones, sorted; None for all classes."""
        num_classes = len(self.prompts)
        if self.classes_per_step is None or self.classes_per_step >= num_classes:
            return None
        present = torch.zeros(num_classes, dtype=torch.bool, device=labels.device)
        present[labels] = True
        priority = torch.rand(num_classes, device=labels.device) + present
        size = max(self.classes_per_step, int(present.sum()))
        return priority.topk(size).indices.sort().values

    def on_train_epoch_start(self) -> None:
        """Puts the adapters into training mode; the base model stays in eval mode."""
        self.model.eval()
        for _, host in adapter_layers(self.model):
            host.adapters.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds dropout by seed, epoch and batch, so that a resumed run is reproducible."""
        source = np.random.SeedSequence([self.seed, self.current_epoch, batch_idx])
        torch.manual_seed(int(source.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the cross-entropy of one batch."""
        accumulate = self.trainer.accumulate_grad_batches
        alone = self.trainer.world_size == 1  # composing once bypasses DDP's reduction
        if accumulate > 1 and alone and not self.composed_weights.open:
            self.composed_weights.begin()
        self.steps_next = (batch_idx + 1) % accumulate == 0 or self.trainer.is_last_batch
        chosen = self._choose_classes(batch.labels)
        labels = batch.labels if chosen is None else torch.searchsorted(chosen, batch.labels)
        logits = self(batch.images, chosen)
        loss = F.cross_entropy(logits, labels)
        if not torch.isfinite(loss):
            bad = (~torch.isfinite(logits).all(dim=1)).tolist()
            keys = [key for key, is_bad in zip(batch.keys, bad, strict=True) if is_bad]
            layer = first_layer_not_finite(self.model, lambda: self(batch.images, chosen))
            raise VlkrError(
                f"the loss is {loss.item()} {self._where(keys or batch.keys)}, first in "
                f"{layer or 'the logits'}; lower optimizer.lr"
            )
        self.step_keys = [*(self.step_keys if batch_idx % accumulate else []), *batch.keys]
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def on_after_backward(self) -> None:
        """Raises :class:`VlkrError` if the model bypasses an adapter, which then cannot train."""
        if self.steps_next and self.composed_weights.open:
            self.composed_weights.finish()
        if self.global_step or not self.steps_next:
            return
        for path, host in adapter_layers(self.model):
            if all(p.grad is None for p in host.adapters.parameters()):
                raise VlkrError(f"the model's forward pass does not use the adapter on {path}")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises :class:`VlkrError` for a gradient that is not finite.

        The loss scaling of ``16-mixed`` skips such steps, and halves its scale each time.
        """
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if all_finite(p.grad for p in trained if p.grad is not None) or (
            scaler is not None and scaler.get_scale() >= 1
        ):
            return
        grads = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        # The backward pass begins at the last layer.
        layer = [name for name, grad in grads.items() if not all_finite([grad])][-1]
        scale = f"a loss scale of {scaler.get_scale():.2g}, " if scaler is not None else ""
        raise VlkrError(
            f"the gradient is not finite {self._where(self.step_keys, scale)}, first in "
            f"{layer.removeprefix('model.')}; lower optimizer.lr"
        )

    def _where(self, keys: list[str], more: str = "") -> str:
        lr = self.lr_schedulers().get_last_lr()[0]  # type: ignore[union-attr]
        return f"at step {self.global_step} ({more}learning rate {lr:.2g}, samples {some_of(keys)})"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts correct predictions."""
        self.val_accuracy(self(batch.images), batch.labels)
        self.log("val_acc1", self.val_accuracy, prog_bar=True, batch_size=len(batch.labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns AdamW over the adapters and the class head, scheduled per step."""
        optimizer, schedule = make_optimizer(
            self.trained_parameters(),
            self.optimizer_options,
            int(self.trainer.estimated_stepping_batches),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reduces the checkpoint to the adapters and the class head, which must be finite."""
        is_trained = self._is_trained()
        state = {k: tensor for k, tensor in checkpoint["state_dict"].items() if is_trained(k)}
        if bad := [key for key, tensor in state.items() if not all_finite([tensor])]:
            raise VlkrError(
                f"{some_of(bad, 1).removeprefix('model.')} not finite after step "
                f"{self.global_step}; lower optimizer.lr"
            )
        checkpoint["state_dict"] = state
        checkpoint["base_sha256"] = self.base_hash
        checkpoint["train_loader"] = self._loader().state_dict()

    def _is_trained(self) -> Callable[[str], bool]:
        """Returns a test of whether a key of the state dict is of what is trained."""
        is_adapter = is_adapter_key(self)
        return lambda key: is_adapter(key) or key.startswith("head.")

    def _loader(self) -> TrainLoader:
        loader = self.trainer.train_dataloader
        assert isinstance(loader, TrainLoader)
        return loader

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises :class:`VlkrError` if the checkpoint is of a different base model or adapter."""
        if checkpoint.get("base_sha256") != self.base_hash:
            raise VlkrError("the checkpoint was written for different base weights")
        is_trained = self._is_trained()
        own = {key: t.shape for key, t in self.state_dict().items() if is_trained(key)}
        if own != {key: t.shape for key, t in checkpoint["state_dict"].items()}:
            raise VlkrError("the checkpoint was written for different adapters or targets")
        self.loader_state = checkpoint["train_loader"]


def make_optimizer(
    parameters: Iterable[nn.Parameter], options: OptimizerConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Returns AdamW and its schedule: linear warm-up, then a half cosine to zero.

    Args:
        parameters: to train.
        options: learning rate, weight decay and warm-up.
        total_steps: number of optimizer steps.
    """
    optimizer = torch.optim.AdamW(
        list(parameters), lr=options.lr, weight_decay=options.weight_decay
    )

    def factor(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        decay_steps = max(1, total_steps - options.warmup_steps)
        progress = min(1.0, (step - options.warmup_steps) / decay_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def first_layer_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Returns the name of the innermost module whose output is not finite first; None for none.

    Args:
        model: model whose modules are hooked.
        forward: function that runs the model.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all_finite(_tensors(output)):
                found.append(name)

        return check

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether every element is finite; synchronizes with the device once."""
    floating = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    return bool(torch.isfinite(nn.utils.get_total_norm(floating, math.inf)))


def some_of(names: list[str], most: int = 8) -> str:
    """Formats names for a message.

    >>> some_of(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
