"""The LightningModule: what is minimised, what is measured, what is stepped."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cifarnet import tta as test_time
from cifarnet.seeding import derive


class Loss(NamedTuple):
    """The objective and its two terms, float scalars."""

    cross_entropy: Tensor
    weight_decay: Tensor
    objective: Tensor


class Classifier(L.LightningModule):
    """A network trained by cross-entropy and weight decay on every learned variable, biases too.

    The objective is cross-entropy + λ/2 Σ‖w‖². The gradient of its second term, λw, is what SGD's `weight_decay=λ`
    adds in `step()`, so `training_step` returns the cross-entropy alone and the term is computed only to be shown.
    (AdamW's decay is decoupled from the gradient: there the term shown is not what is minimised.)

    Metrics, each a mean over the epoch's images, but for the decay, which is taken at the epoch's end:
    train/cross_entropy, train/weight_decay, train/objective, train/accuracy, val/cross_entropy, val/accuracy,
    test/cross_entropy, test/accuracy; one_view/… are those of the test without its test-time augmentation. Where the
    loader chooses the hardest images for an epoch (`data.hardest_share`), train/… are means over those.

    Args:
        network: images [B, C, H, W], uint8 or float in [0, 1] -> logits [B, num_classes].
        optimizer: makes the optimizer out of the parameters, such as `partial(torch.optim.SGD, lr=0.05)`.
        scheduler: makes a schedule out of the optimizer, stepped after every batch; None: a constant rate.
        label_smoothing: share of the target that is spread over all classes, in the training loss only.
        tta: test-time augmentation, in the test only: "none", "mirror" or "mirror_translate" (see `tta.predict`).
        tta_share: which part of the test images, the least confident of each batch, it is for.
        channels_last: memory format of network and images: faster on most CPUs and GPUs.
        seed: what torch draws during an epoch (dropout) is a function of (seed, epoch).
        recipe: plain data (dicts, lists, scalars) to be kept in the checkpoint beside the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        label_smoothing: float = 0.0,
        tta: str = "none",
        tta_share: float = 1.0,
        channels_last: bool = True,
        seed: int = 0,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(dict(recipe or {}), logger=False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.optimizer = optimizer(self.network.parameters())
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.label_smoothing = label_smoothing
        test_time.check(tta, tta_share)
        self.tta, self.tta_share = tta, tta_share
        self.seed = seed
        for stage in ("train", "val", "test", "one_view"):
            # sums of (cross-entropy, correct, 1) over the epoch's images
            self.register_buffer(f"{stage}_sums", torch.zeros(3), persistent=False)
        self._restored_rng: dict[str, Any] | None = None
        self._observe: Callable[[Tensor], None] | None = None  # told the losses of each training batch

    def forward(self, images: Tensor) -> Tensor:
        """Logits in float32, whatever the precision of the network."""
        return self.network(images.contiguous(memory_format=self.memory_format)).float()

    def loss(self, logits: Tensor, labels: Tensor) -> Loss:
        """The objective of logits [B, num_classes] and labels int64 [B], and its two terms."""
        cross_entropy = self._cross_entropy(logits, labels)
        decay = self._weight_decay()
        return Loss(cross_entropy, decay, cross_entropy + decay)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction=reduction)

    def _weight_decay(self) -> Tensor:
        """λ/2 Σ‖w‖², with each parameter group's own λ."""
        terms = [
            group.get("weight_decay", 0.0) / 2 * parameter.square().sum()
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        ]
        return torch.stack(terms).sum()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        cross_entropies = self._cross_entropy(logits, labels, reduction="none")
        if self._observe is not None:
            self._observe(cross_entropies)
        cross_entropy = cross_entropies.mean()
        self._count("train", cross_entropy, logits, labels)
        return cross_entropy

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self._count("val", F.cross_entropy(logits, labels), logits, labels)
        return logits

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        one_view, logits = test_time.predict(self, images, self.tta, self.tta_share)
        self._count("one_view", F.cross_entropy(one_view, labels), one_view, labels)
        self._count("test", F.cross_entropy(logits, labels), logits, labels)
        return logits

    @torch.no_grad()
    def _count(self, stage: str, cross_entropy: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Sums stay on the device: reading a number in every step would make a GPU wait."""
        correct = (logits.argmax(1) == labels).sum()
        sums = getattr(self, f"{stage}_sums")
        sums += torch.stack([cross_entropy * len(labels), correct, torch.ones_like(cross_entropy) * len(labels)])

    def means(self, stage: str) -> dict[str, float]:
        """Cross-entropy and accuracy of "train", "val", "test" or "one_view" since the epoch began."""
        cross_entropy, correct, count = getattr(self, f"{stage}_sums").tolist()
        count = count or float("nan")
        return {f"{stage}/cross_entropy": cross_entropy / count, f"{stage}/accuracy": correct / count}

    @torch.no_grad()
    def training_metrics(self) -> dict[str, float]:
        """All metrics of the training epoch so far."""
        metrics = self.means("train")
        decay = self._weight_decay().item()
        return {
            **metrics,
            "train/weight_decay": decay,
            "train/objective": metrics["train/cross_entropy"] + decay,
        }

    def configure_optimizers(self) -> dict[str, Any]:
        if self.scheduler is None:
            return {"optimizer": self.optimizer}
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        loader = self.trainer.train_dataloader
        self._observe = loader.observe if getattr(loader, "chooses", False) else None
        if self._restored_rng is not None:
            torch.set_rng_state(self._restored_rng["cpu"].cpu())
            if self.device.type == "cuda" and "cuda" in self._restored_rng:
                torch.cuda.set_rng_state(self._restored_rng["cuda"].cpu(), self.device)
            self._restored_rng = None

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(derive(self.seed, self.current_epoch, "torch"))
        self.train_sums.zero_()

    def on_validation_epoch_start(self) -> None:
        self.val_sums.zero_()

    def on_test_epoch_start(self) -> None:
        self.test_sums.zero_()
        self.one_view_sums.zero_()

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.training_metrics(), logger=False)  # for callbacks; History writes to the logger

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.means("val"), logger=False)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.means("test"), logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["middle_of_epoch"] = {"rng": rng, "train_sums": self.train_sums}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["middle_of_epoch"]
        self.train_sums.copy_(saved["train_sums"])
        self._restored_rng = saved["rng"]
