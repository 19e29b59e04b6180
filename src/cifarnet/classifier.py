"""The LightningModule: the objective, the metrics and the optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cifarnet.data.datamodule import check_batch
from cifarnet.data.loader import Batch
from cifarnet.errors import UserError
from cifarnet.models.tta import TTA, AveragedLogits
from cifarnet.optim.decay import decay_groups
from cifarnet.optim.schedules import Interval, planned_steps
from cifarnet.schema import Range
from cifarnet.seeding import derive
from cifarnet.system.distributed import all_gather, rank, world_size


class Classifier(L.LightningModule):
    """A network trained with cross-entropy and weight decay on every learned parameter, including biases.

    The objective is cross-entropy + λ/2 Σ‖w‖². SGD's `step()` adds λw, the gradient of the second term, for
    `weight_decay=λ`, so `training_step` returns the cross-entropy alone. The second term is computed only for logging.
    (AdamW decouples the decay from the gradient; the logged term is then not minimized.)

    Metrics are means over the images of an epoch: cross_entropy and accuracy of train/…, val/…, test/…, and of
    one_view/… (the test without augmentation). train/weight_decay and train/objective are computed at its end.

    With several ranks, each rank processes its part of every batch. The gradient and the metrics are those of the
    whole batch. Except for rounding, only the statistics of batch norm layers (rank 0's are kept) and the dropout masks
    differ from a single process.

    Args:
        network: images [B, C, H, W], uint8 or float in [0, 1] -> logits [B, num_classes].
        optimizer: creates the optimizer from the parameters, such as `partial(torch.optim.SGD, lr=0.05)`.
        scheduler: creates the learning-rate schedule from the optimizer and the number of steps of the whole run (0 if
            the run has no end). None keeps the learning rate constant.
        scheduler_interval: whether the schedule is stepped, and `total_steps` counted, by optimizer step or by epoch.
            ReduceLROnPlateau is always stepped after a validation: with the accuracy if its mode is "max", otherwise
            with the cross-entropy.
        objective: logits [B, num_classes], labels int64 [B] -> the loss of each image [B]. None uses the cross-entropy.
        teacher: losses [B], logits and images -> losses [B] that include a distillation term, such as
            `recipes.distillation.Teacher`.
        tta, tta_share: test-time augmentation, and the fraction of the test images that are augmented.
        no_decay: apply no weight decay to parameters with fewer than two dimensions: biases and norm layers.
        channels_last: use this memory format for the network and the images; it is faster on most hardware.
        seed: determines dropout and other random draws, which are a function of (seed, epoch).
        hparams: plain data (dicts, lists, scalars) to store in the checkpoint.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        scheduler_interval: Interval = "step",
        teacher: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        tta: TTA = "none",
        tta_share: Annotated[float, Range(0, 1)] = 1.0,
        no_decay: bool = False,
        channels_last: bool = True,
        seed: int = 0,
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(dict(hparams or {}), logger=False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.objective = objective or nn.CrossEntropyLoss(reduction="none")
        self.make_optimizer, self.make_scheduler, self.teacher = optimizer, scheduler, teacher
        self.scheduler_interval: Interval = scheduler_interval
        self.tta: TTA = tta
        self.tta_share, self.no_decay, self.seed = tta_share, no_decay, seed
        # sums of (loss, correct, 1) over an epoch's images on this rank; not buffers, which EMA and DDP would change
        self.sums = {stage: torch.zeros(3) for stage in ("train", "val", "test", "one_view")}
        self._totals: dict[str, Tensor] = {}  # the sums over all ranks, once the epoch has ended
        self.total_steps = 0.0  # the steps of the schedule in the whole run; infinite if it has no end
        self.logs_test = True  # whether the metrics of a test are sent to the loggers
        self.test_logits: Tensor | None = None  # [N, num_classes], after the test
        self.test_index: Tensor | None = None  # the indices of their images, int64 [N]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        raise UserError(f"Load the network with cifarnet.load({str(checkpoint_path)!r}).network instead.")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits in float32, for any precision of the network."""
        logits = self.network(images.contiguous(memory_format=self.memory_format))
        return logits.to(torch.float32, copy=True)  # the next replay of a CUDA graph overwrites its output

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        logits, losses = self.forward_and_loss(batch)
        loss = losses.mean()
        self._count("train", loss, logits, batch.labels)
        self._totals.pop("train", None)
        return {"loss": self.scale_loss(loss, len(losses)), "losses": losses.detach(), "logits": logits.detach()}

    def forward_and_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits [B, num_classes] and the loss of each image [B], including the teacher's term."""
        logits = self(check_batch(batch).images)
        losses = self.objective(logits, batch.labels)
        if batch.partners is not None and batch.lam is not None:
            losses = batch.lam * losses + (1 - batch.lam) * self.objective(logits, batch.partners)
        return logits, losses if self.teacher is None else self.teacher(losses, logits, batch.images)

    def scale_loss(self, loss: Tensor, count: int) -> Tensor:
        """Weight the loss of a rank by its number of images, because DDP gives equal weight to all ranks."""
        if world_size() == 1:
            return loss
        loader: Any = self.trainer.train_dataloader
        return loss * (world_size() * count / loader.batch_size)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(check_batch(batch).images)
        self._count("val", F.cross_entropy(logits, batch.labels), logits, batch.labels)
        return logits

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        one_view = self._averaged.add(check_batch(batch).images)
        self._count("one_view", F.cross_entropy(one_view, batch.labels), one_view, batch.labels)
        self._test_labels.append(batch.labels)
        self._test_index.append(batch.index)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(check_batch(batch).images)

    @torch.no_grad()
    def _count(self, stage: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Update the sums on the device: reading a number in every step would make the host wait for the GPU."""
        correct = (logits.argmax(1) == labels).sum()
        self.sums[stage] += torch.stack([loss * len(labels), correct, torch.ones_like(loss) * len(labels)])

    def means(self, stage: str) -> dict[str, float]:
        """Return cross-entropy and accuracy of "train", "val", "test" or "one_view" since the epoch began: over
        all ranks after the epoch, over this rank during it."""
        loss, correct, count = self._totals.get(stage, self.sums[stage]).tolist()
        count = count or float("nan")
        return {f"{stage}/cross_entropy": loss / count, f"{stage}/accuracy": correct / count}

    def total(self, stage: str) -> Tensor:
        """Return the sums over all ranks. All ranks must call it."""
        return self._totals[stage] if stage in self._totals else torch.stack(all_gather(self.sums[stage])).sum(0)

    @torch.no_grad()
    def weight_decay(self) -> Tensor:
        """Return λ/2 Σ‖w‖², where each parameter group has its own λ."""
        terms = [
            group.get("weight_decay", 0.0) / 2 * parameter.square().sum()
            for group in self.trainer.optimizers[0].param_groups
            for parameter in group["params"]
        ]
        return torch.stack(terms).sum()

    def training_metrics(self) -> dict[str, float]:
        """Return all metrics of the training epoch so far."""
        metrics, decay = self.means("train"), self.weight_decay().item()
        return metrics | {"train/weight_decay": decay, "train/objective": metrics["train/cross_entropy"] + decay}

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(decay_groups(self.network) if self.no_decay else self.network.parameters())
        self.total_steps, _ = planned_steps(self.trainer, self.scheduler_interval)
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        is_finite = self.total_steps < float("inf")
        schedule = {"scheduler": self.make_scheduler(optimizer, int(self.total_steps) if is_finite else 0)}
        schedule |= {"interval": self.scheduler_interval, "reduce_on_plateau": False}  # on_validation_epoch_end does
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            return
        try:
            super().lr_scheduler_step(scheduler, metric)
        except (ValueError, ArithmeticError) as error:
            raise UserError(f"scheduler: step {self.global_step} failed: {error}. Change its settings.") from error

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip gradients as Lightning does, but allow fused optimizers when gradients are not scaled (bfloat16)."""
        if not gradient_clip_val:
            return
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if is_scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError("trainer.gradient_clip_val with float16 requires optimizer.fused=false.")
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        clip(self.network.parameters(), gradient_clip_val)

    def _reset(self, *stages: str) -> None:
        self.sums |= {stage: torch.zeros(3, device=self.device) for stage in stages}
        self._totals = {stage: total for stage, total in self._totals.items() if stage not in stages}

    def seed_epoch(self) -> None:
        """Seed torch's global generator for the current epoch and this rank."""
        torch.manual_seed(derive(self.seed, self.current_epoch, f"torch{rank() or ''}"))

    def on_train_epoch_start(self) -> None:
        self.seed_epoch()
        self._reset("train")

    def on_train_batch_end(self, *_: Any) -> None:
        trainer = self.trainer
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        if world_size() > 1 and ends:
            self._totals["train"] = self.total("train")  # callbacks read it before `on_train_epoch_end` of this module

    def on_validation_epoch_start(self) -> None:
        self._reset("val")
        if world_size() > 1:  # all ranks validate the same network: each has its own batch norm statistics
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_test_epoch_start(self) -> None:
        self._reset("test", "one_view")
        self._test_labels: list[Tensor] = []
        self._test_index: list[Tensor] = []
        num_batches = int(sum(self.trainer.num_test_batches)) * world_size()
        self._averaged = AveragedLogits(self, num_batches, self.tta, self.tta_share)

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.training_metrics(), logger=False)  # for callbacks; History writes to the loggers

    def on_validation_epoch_end(self) -> None:
        self._totals["val"] = self.total("val")
        self.log_dict(self.means("val"), logger=self.trainer.state.fn == "validate")  # not during training
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau) and not self.trainer.sanity_checking:
            scheduler.step(self.means("val")["val/accuracy" if scheduler.mode == "max" else "val/cross_entropy"])

    def on_test_epoch_end(self) -> None:
        with self.trainer.precision_plugin.test_step_context():
            answers = self._averaged.final()
        for logits, labels in zip(answers, self._test_labels, strict=True):
            self._count("test", F.cross_entropy(logits, labels), logits, labels)
        self._totals |= {stage: self.total(stage) for stage in ("test", "one_view")}
        self.test_logits = torch.cat(all_gather(torch.cat(answers)))
        self.test_index = torch.cat(all_gather(torch.cat(self._test_index)))
        self.log_dict(self.means("test"), logger=self.logs_test)
