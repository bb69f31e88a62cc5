from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from vlkr.adapters import ComposedOnce, adapter_parameters
from vlkr.adapters.inject import hosts
from vlkr.datasets.pipelines import Batch
from vlkr.errors import VlkrError
from vlkr.models.clip import ClipBundle, encode_image, logit_scale
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts
from vlkr.training.optim import OptimizerOptions, make_optimizer


class FewShotModule(L.LightningModule):
    """Trains a model's adapters by cross-entropy between image features and class embeddings.

    The class embeddings are recomputed at every step when the text tower carries adapters, and
    once otherwise. Checkpoints hold the adapters and the optimizer, never the base weights.

    Args:
        bundle: a model with adapters.
        class_names: by label.
        templates: with the placeholder ``{c}``.
        optimizer: options.
        seed: of dropout, and of the classes of a step.
        classes_per_step: with more classes than these a step uses the batch's and random others,
            which bounds the text tower's work; None for all classes.
    """

    def __init__(
        self,
        bundle: ClipBundle,
        class_names: tuple[str, ...],
        templates: tuple[str, ...],
        optimizer: OptimizerOptions,
        seed: int,
        classes_per_step: int | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False
        self.model = bundle.model
        self.base_hash = bundle.weights_hash
        self.optimizer_options = optimizer
        self.seed = seed
        self.classes_per_step = classes_per_step
        self.composed_once = ComposedOnce(bundle.model)
        self.steps_next = True
        self.prompts: Tensor
        self.embeddings: Tensor
        prompts = tokenize_prompts(bundle.tokenizer, class_names, templates)
        self.register_buffer("prompts", prompts, persistent=False)
        self.register_buffer("embeddings", torch.empty(0), persistent=False)
        self.adapted_towers = {
            "visual" if path.startswith("visual") else "text" for path, _ in hosts(bundle.model)
        }
        self.val_accuracy = MulticlassAccuracy(num_classes=len(class_names), average="micro")

    def on_fit_start(self) -> None:
        """Encodes the prompts once, for a text tower without adapters."""
        if "text" not in self.adapted_towers:
            with torch.no_grad():
                self.embeddings = class_embeddings(self.model, self.prompts)

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits of images ``(batch, 3, height, width)`` for all classes, or for those given.

        Args:
            images: normalised as the model wants them.
            classes: labels ``(num_chosen)``, None for all.

        Returns:
            ``(batch, num_classes)`` or ``(batch, num_chosen)``.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and "visual" in self.adapted_towers):
            features = encode_image(self.model, images)
        if "text" in self.adapted_towers:
            prompts = self.prompts if classes is None else self.prompts[classes]
            embeddings = class_embeddings(self.model, prompts)
        else:
            embeddings = self.embeddings if classes is None else self.embeddings[classes]
        return logit_scale(self.model) * features @ embeddings.T

    def _choose_classes(self, labels: Tensor) -> Tensor | None:
        """The batch's classes and random others, sorted; None for all."""
        num_classes = len(self.prompts)
        if self.classes_per_step is None or self.classes_per_step >= num_classes:
            return None
        present = torch.zeros(num_classes, dtype=torch.bool, device=labels.device)
        present[labels] = True
        priority = torch.rand(num_classes, device=labels.device) + present
        size = max(self.classes_per_step, int(present.sum()))
        return priority.topk(size).indices.sort().values

    def on_train_epoch_start(self) -> None:
        """The base model stays in eval mode, the adapters train."""
        self.model.eval()
        for _, host in hosts(self.model):
            host.adapters.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout follows from seed and epoch, so that a resumed run repeats an unbroken one.

        Seeded here, for opening a data loader takes from the generator.
        """
        if batch_idx == 0:
            torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate > 1 and not self.composed_once.open:
            self.composed_once.begin()
        self.steps_next = (batch_idx + 1) % accumulate == 0 or self.trainer.is_last_batch
        chosen = self._choose_classes(batch.labels)
        labels = batch.labels if chosen is None else torch.searchsorted(chosen, batch.labels)
        loss = F.cross_entropy(self(batch.images, chosen), labels)
        if not torch.isfinite(loss):
            lr = self.lr_schedulers().get_last_lr()[0]  # type: ignore[union-attr]
            raise VlkrError(
                f"the loss is {loss.item()} at step {self.global_step} (learning rate {lr:.2g}, "
                f"samples {', '.join(batch.keys[:4])}, ...); lower optimizer.lr"
            )
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def on_after_backward(self) -> None:
        """Refuses a model whose code bypasses an adapter, which would silently not be trained."""
        if self.steps_next and self.composed_once.open:
            self.composed_once.finish()
        if self.global_step or not self.steps_next:
            return
        for path, host in hosts(self.model):
            if all(p.grad is None for p in host.adapters.parameters()):
                raise VlkrError(f"the model's forward pass does not use the adapter on {path}")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts right answers."""
        self.val_accuracy(self(batch.images), batch.labels)
        self.log("val_acc1", self.val_accuracy, prog_bar=True, batch_size=len(batch.labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the adapters, with a schedule a step."""
        optimizer, schedule = make_optimizer(
            adapter_parameters(self.model),
            self.optimizer_options,
            int(self.trainer.estimated_stepping_batches),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the adapters only."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: state[key] for key in state if ".adapters." in key}
        checkpoint["base_sha256"] = self.base_hash

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises :class:`VlkrError` if the checkpoint belongs to another base model or adapter."""
        if checkpoint.get("base_sha256") != self.base_hash:
            raise VlkrError("the checkpoint was written for other base weights")
        own = {key for key in self.state_dict() if ".adapters." in key}
        if own != set(checkpoint["state_dict"]):
            raise VlkrError("the checkpoint was written for other adapters or targets")
