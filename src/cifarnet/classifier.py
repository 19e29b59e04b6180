"""The LightningModule: what is minimised, what is measured, what is stepped."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cifarnet.errors import UserError
from cifarnet.models import tta as test_time
from cifarnet.seeding import derive
from cifarnet.system.distributed import all_gather, rank, world_size

Batch = tuple[Tensor, ...]  # images, labels, index, and where images are mixed: partners' labels, own weight


class Classifier(L.LightningModule):
    """A network trained by cross-entropy and weight decay on every learned variable, biases too.

    The objective is cross-entropy + λ/2 Σ‖w‖². The gradient of its second term, λw, is what SGD's `weight_decay=λ`
    adds in `step()`, so `training_step` returns the cross-entropy alone and the term is computed only to be shown.
    (AdamW's decay is decoupled from the gradient: there the term shown is not what is minimised.)

    Metrics, each a mean over the epoch's images, but for the decay, which is taken at the epoch's end:
    train/cross_entropy, train/weight_decay, train/objective, train/accuracy, val/cross_entropy, val/accuracy,
    test/cross_entropy, test/accuracy; one_view/… are those of the test without its test-time augmentation. Where the
    loader chooses the hardest images for an epoch (`data.hardest_share`), train/… are means over those.

    Of several ranks each computes its share of every batch, and all have the same metrics, over all shares. The
    gradient is that of the whole batch; what differs from one process, beyond rounding, are a batch norm's statistics
    (a share's; those kept are rank 0's) and dropout's draws.

    Args:
        network: images [B, C, H, W], uint8 or float in [0, 1] -> logits [B, num_classes].
        optimizer: makes the optimizer out of the parameters, such as `partial(torch.optim.SGD, lr=0.05)`.
        scheduler: makes a schedule out of the optimizer and the number of its steps in the whole run (0 if it has no
            end); it is stepped after every batch. None: a constant rate.
        objective: logits [B, num_classes], labels int64 [B] -> each image's training loss [B]; None: cross-entropy.
        teacher: losses [B], logits and images -> losses [B] with its own part, such as `recipes.distillation.Teacher`.
        tta: test-time augmentation, in the test only: "none", "mirror" or "mirror_translate" (see `tta.Answers`).
        tta_share: which part of the test images, the least confident, it is for.
        no_decay: leave the weight decay off the variables with fewer than two dimensions: biases and those of norms.
        channels_last: memory format of network and images: faster on most CPUs and GPUs.
        seed: what torch draws during an epoch (dropout) is a function of (seed, epoch).
        hparams: plain data (dicts, lists, scalars) to be kept in the checkpoint beside the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        teacher: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        tta: str = "none",
        tta_share: float = 1.0,
        no_decay: bool = False,
        channels_last: bool = True,
        seed: int = 0,
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        test_time.check(tta, tta_share)
        self.save_hyperparameters(dict(hparams or {}), logger=False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.objective = objective or nn.CrossEntropyLoss(reduction="none")
        self.make_optimizer, self.make_scheduler, self.teacher = optimizer, scheduler, teacher
        self.tta, self.tta_share, self.no_decay = tta, tta_share, no_decay
        self.seed = seed
        # sums of (loss, correct, 1) over the epoch's images: no buffers, which averaging and DDP would change
        self._sums = {stage: torch.zeros(3) for stage in ("train", "val", "test", "one_view")}  # of this rank
        self._totals: dict[str, Tensor] = {}  # of all ranks, when an epoch is over
        self.planned_steps = 0.0  # of the whole run, once it has begun; infinite where it has no end
        self.tested: Tensor | None = None  # the test's logits [N, num_classes], when it is over,
        self.tested_index: Tensor | None = None  # and of which images, int64 [N]
        self._restored_rng: list[dict[str, Any]] = []  # of each rank
        self._observe: Callable[[Tensor, Tensor], None] | None = None  # told each training image's loss

    def forward(self, images: Tensor) -> Tensor:
        """Logits in float32, whatever the precision of the network."""
        logits = self.network(images.contiguous(memory_format=self.memory_format))
        return logits.to(torch.float32, copy=True)  # a CUDA graph writes its next answer over this one

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _, labels, index, *_ = batch
        logits, losses = self.forward_and_loss(batch)
        if self._observe is not None:
            self._observe(index, losses)
        loss = losses.mean()
        self._count("train", loss, logits, labels)
        self._totals.pop("train", None)
        return self.scale_loss(loss, len(labels))

    def forward_and_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, num_classes] and each image's loss [B], the teacher's part included."""
        images, labels, _, *mixed = batch
        logits = self(images)
        losses = self.losses(logits, labels, *mixed)
        return logits, losses if self.teacher is None else self.teacher(losses, logits, images)

    def scale_loss(self, loss: Tensor, count: int) -> Tensor:
        """What a rank that has `count` images of a batch minimises: gradients are averaged evenly."""
        ranks = world_size()
        return loss if ranks == 1 else loss * (ranks * count / self.trainer.train_dataloader.batch_size)

    def losses(
        self, logits: Tensor, labels: Tensor, partners: Tensor | None = None, own: Tensor | None = None
    ) -> Tensor:
        """The loss of each image, [B]. Where two were mixed, `own` [B] is the weight of the first one's label."""
        losses = self.objective(logits, labels)
        if partners is None or own is None:
            return losses
        return own * losses + (1 - own) * self.objective(logits, partners)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, *_ = batch
        logits = self(images)
        self._count("val", F.cross_entropy(logits, labels), logits, labels)
        return logits

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels, index, *_ = batch
        one_view = self._answers.add(images)
        self._count("one_view", F.cross_entropy(one_view, labels), one_view, labels)
        self._labels.append(labels)
        self._tested.append(index)

    @torch.no_grad()
    def _count(self, stage: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Sums stay on the device: reading a number in every step would make a GPU wait."""
        correct = (logits.argmax(1) == labels).sum()
        self._sums[stage] += torch.stack([loss * len(labels), correct, torch.ones_like(loss) * len(labels)])

    def means(self, stage: str) -> dict[str, float]:
        """Cross-entropy and accuracy of "train", "val", "test" or "one_view" since the epoch began: of all ranks when
        it is over, and until then of this one."""
        loss, correct, count = self._totals.get(stage, self._sums[stage]).tolist()
        count = count or float("nan")
        return {f"{stage}/cross_entropy": loss / count, f"{stage}/accuracy": correct / count}

    def _total(self, stage: str) -> Tensor:
        """The sums of all ranks."""
        return self._totals[stage] if stage in self._totals else torch.stack(all_gather(self._sums[stage])).sum(0)

    @torch.no_grad()
    def weight_decay(self) -> Tensor:
        """λ/2 Σ‖w‖², with each parameter group's own λ."""
        terms = [
            group.get("weight_decay", 0.0) / 2 * parameter.square().sum()
            for group in self.optimizers(use_pl_optimizer=False).param_groups
            for parameter in group["params"]
        ]
        return torch.stack(terms).sum()

    def training_metrics(self) -> dict[str, float]:
        """All metrics of the training epoch so far."""
        metrics, decay = self.means("train"), self.weight_decay().item()
        return metrics | {"train/weight_decay": decay, "train/objective": metrics["train/cross_entropy"] + decay}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(self._decayed_apart() if self.no_decay else self.network.parameters())
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        steps = self.trainer.estimated_stepping_batches
        scheduler = self.make_scheduler(optimizer, 0 if steps == float("inf") else int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _decayed_apart(self) -> list[dict[str, Any]]:
        """Parameter groups: what the optimizer's weight decay is for, and what it is not."""
        kinds: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter in self.network.parameters():
            kinds[parameter.ndim > 1].append(parameter)
        return [{"params": kinds[True]}, {"params": kinds[False], "weight_decay": 0.0}]

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        try:
            super().lr_scheduler_step(scheduler, metric)
        except (ValueError, ArithmeticError) as error:
            raise UserError(f"scheduler, in step {self.global_step}: {error}. Choose other settings of it.") from error

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning's, but a fused optimizer may be clipped where nothing scales its gradients (bfloat16)."""
        if not gradient_clip_val:
            return
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError("trainer.gradient_clip_val in float16 needs optimizer.fused=false.")
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        clip(self.network.parameters(), gradient_clip_val)

    def on_train_start(self) -> None:
        # counting the steps made the loader before the checkpoint's loops were read, where its place is
        fit_loop = self.trainer.fit_loop
        if states := fit_loop._combined_loader_states_to_load:  # Lightning forgets them at an epoch's end
            fit_loop._combined_loader._load_state_dicts(states)
            fit_loop._combined_loader_states_to_load = []
        self.planned_steps = self.trainer.estimated_stepping_batches
        self._sums["train"] = self._sums["train"].to(self.device)  # those of a checkpoint were read before it moved
        loader = self.trainer.train_dataloader
        self._observe = loader.observe if getattr(loader, "chooses", False) else None
        if rank() < len(self._restored_rng):
            rng = self._restored_rng[rank()]
            torch.set_rng_state(rng["cpu"].cpu())
            if self.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)
        elif self._restored_rng:  # it was trained by fewer ranks
            self._seed()
        self._restored_rng = []

    def _begin(self, *stages: str) -> None:
        self._sums |= {stage: torch.zeros(3, device=self.device) for stage in stages}
        self._totals = {stage: total for stage, total in self._totals.items() if stage not in stages}

    def _seed(self) -> None:
        torch.manual_seed(derive(self.seed, self.current_epoch, f"torch{rank() or ''}"))

    def on_train_epoch_start(self) -> None:
        self._seed()
        self._begin("train")

    def on_train_batch_end(self, *_: Any) -> None:
        if world_size() > 1 and (self.trainer.fit_loop.epoch_loop._is_training_done or self.trainer.should_stop):
            self._totals["train"] = self._total("train")  # callbacks read them before this module ends the epoch

    def on_validation_epoch_start(self) -> None:
        self._begin("val")
        if world_size() > 1:  # all validate one network: a step leaves each rank its own statistics
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_test_epoch_start(self) -> None:
        self._begin("test", "one_view")
        self._labels, self._tested, batches = [], [], int(sum(self.trainer.num_test_batches)) * world_size()
        self._answers = test_time.Answers(self, batches, self.tta, self.tta_share)

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.training_metrics(), logger=False)  # for callbacks; History writes to the logger

    def on_validation_epoch_end(self) -> None:
        self._totals["val"] = self._total("val")
        self.log_dict(self.means("val"), logger=False)

    def on_test_epoch_end(self) -> None:
        with self.trainer.precision_plugin.test_step_context():
            answers = self._answers.final()
        for logits, labels in zip(answers, self._labels, strict=True):
            self._count("test", F.cross_entropy(logits, labels), logits, labels)
        self._totals |= {stage: self._total(stage) for stage in ("test", "one_view")}
        self.tested = torch.cat(all_gather(torch.cat(answers)))
        self.tested_index = torch.cat(all_gather(torch.cat(self._tested)))
        self.log_dict(self.means("test"), logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rng = {"cpu": all_gather(torch.get_rng_state())}
        if self.device.type == "cuda":
            rng["cuda"] = all_gather(torch.cuda.get_rng_state(self.device))
        first, *others = [dict(zip(rng, states, strict=True)) for states in zip(*rng.values(), strict=True)]
        checkpoint["middle_of_epoch"] = {"rng": first, "other_ranks": others, "train_sums": self._total("train")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["middle_of_epoch"]
        self._sums["train"] = saved["train_sums"] * (rank() == 0)
        self._restored_rng = [saved["rng"], *saved["other_ranks"]]
