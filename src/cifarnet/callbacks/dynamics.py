"""Training dynamics: how the network classifies each training image in each epoch."""

import io
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifarnet.data.loader import Batch
from cifarnet.errors import UserError
from cifarnet.system import files
from cifarnet.system.distributed import all_gather

FILE = "dynamics.npz"
SCORES = ("loss", "probability", "margin", "error")
UNUSED = -1  # as a class; the bits of -1 are NaN as a float16


class Dynamics(Callback):
    """Records how the network classifies each training image in each epoch, and writes `dynamics.npz` into the run's
    folder when training ends. `python -m cifarnet.audit` reads it. The results of the run do not change.

    The values are those of the training step: of the augmented image, with the weights before the step. If an epoch
    does not use an image (data.hardest_share, trainer.limit_train_batches), they are NaN, and `predicted` is -1. If
    data.sampler repeats an image within an epoch, they describe one of the repetitions.

    The file contains these arrays for E epochs and N training images:

        loss: the loss of the run's objective, with the teacher's term, float16 [E, N].
        probability: the probability of the label, float16 [E, N].
        margin: the logit of the label minus the largest other logit (Pleiss et al., 2020), float16 [E, N].
        error: the L2 norm of the probabilities minus the one-hot label (EL2N, Paul et al., 2021), float16 [E, N].
        predicted: the class with the largest logit, int16 [E, N].
        labels: the labels in training, int64 [N].
        index: the positions of the images in the training images of the data set, int64 [N].
        class_names: the names of the classes.

    Config: `callbacks.dynamics`, as in `callbacks=dynamics`.

    Raises:
        UserError: images are mixed.
    """

    def __init__(self) -> None:
        # for each epoch, int16 [5, N]: the bits of the scores as float16, and the predicted class; the last one is on
        # the module's device, and contains only the images of this rank
        self.epochs: list[Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if cast("Any", trainer).datamodule.mix is not None:
            problem = "callbacks.dynamics cannot be combined with data.mix (+recipe=mixup, +recipe=cutmix)"
            raise UserError(f"{problem}, which gives an image two labels. Remove one of them.")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if len(self.epochs) <= trainer.current_epoch:
            unused = torch.full((5, len(cast("Any", trainer.train_dataloader).labels)), UNUSED, dtype=torch.int16)
            self.epochs = [*self.state_dict()["epochs"], unused]
        self.epochs[-1] = self.epochs[-1].to(pl_module.device)  # moved once
        self.epochs[-1][:, batch.index] = describe(outputs["logits"], batch.labels, outputs["losses"])

    def state_dict(self) -> dict[str, Any]:
        """Return the values of all ranks, on the CPU. All ranks must call it."""
        return {"epochs": [*self.epochs[:-1], *map(over_ranks, self.epochs[-1:])]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = self.state_dict()["epochs"]
        if not epochs or not trainer.is_global_zero:
            return
        source = cast("Any", trainer).datamodule.source
        *scores, predicted = torch.stack(epochs, 1).numpy()
        arrays = {name: row.view(np.float16) for name, row in zip(SCORES, scores, strict=True)}
        arrays |= {"labels": source.train.labels.numpy(), "index": source.train_index.numpy(), "predicted": predicted}
        content = io.BytesIO()
        np.savez_compressed(content, **arrays, class_names=np.array(source.class_names))
        files.write(Path(trainer.default_root_dir, FILE), content.getbuffer())


def describe(logits: Tensor, labels: Tensor, losses: Tensor) -> Tensor:
    """Return what `Dynamics` records of each image, int16 [5, B].

    Args:
        logits: float [B, num_classes].
        labels: int64 [B].
        losses: float [B].
    """
    label, probabilities = labels[:, None], logits.softmax(1)
    probability = probabilities.gather(1, label)
    margin = logits.gather(1, label) - logits.scatter(1, label, -torch.inf).amax(1, keepdim=True)
    error = probabilities.scatter(1, label, probability - 1).norm(dim=1, keepdim=True)
    scores = torch.cat([losses[:, None], probability, margin, error], 1).half()
    return torch.cat([scores.view(torch.int16), logits.argmax(1, keepdim=True).short()], 1).T


def over_ranks(epoch: Tensor) -> Tensor:
    """Combine the values of an epoch, int16 [5, N], of all ranks: those of the first rank that used the image. The
    result is on the CPU."""
    ranks = torch.stack(all_gather(epoch.cpu()))
    first = (ranks[:, -1] != UNUSED).int().argmax(0)
    return ranks.gather(0, first.expand_as(epoch)[None])[0]
