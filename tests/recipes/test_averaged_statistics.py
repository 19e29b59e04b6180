"""EMA and SWA also average the statistics of batch norms."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from cifarnet.classifier import Classifier
from cifarnet.data.loader import Batch
from cifarnet.recipes.ema import EMA
from cifarnet.recipes.swa import SWA
from test_classifier import quiet_trainer


class Statistics(Callback):
    """Records the statistics of a batch norm after each batch, and those that are validated."""

    def __init__(self) -> None:
        self.after, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.after.append(module.network[1].running_var.clone())

    def on_validation_batch_start(self, trainer, module, *_):
        self.validated.append(module.network[1].running_var.clone())


def fitted(recipe: Callback, epochs: int, **settings) -> Statistics:
    """Train for `epochs` of four batches."""
    random = torch.Generator().manual_seed(0)
    batches = [
        Batch(scale * torch.rand(8, 3, 2, 2, generator=random), torch.arange(8), torch.arange(8))
        for scale in (1.0, 2.0, 4.0, 8.0)
    ]
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 10))
    module, seen = Classifier(network, partial(torch.optim.SGD, lr=0.1)), Statistics()
    loader = DataLoader(batches, batch_size=None)
    quiet_trainer(max_epochs=epochs, callbacks=[recipe, seen], **settings).fit(module, loader, loader)
    return seen


@pytest.mark.parametrize("window", [1, 2])
def test_ema_averages_the_statistics_after_each_step(window):
    """With gradient accumulation, a step has several batches."""
    seen = fitted(EMA(0.6), 1, accumulate_grad_batches=window)
    first, *others = seen.after[window - 1 :: window]
    average = first
    for statistics in others:
        average = 0.6 * average + 0.4 * statistics
    torch.testing.assert_close(seen.validated[-1], average)


def test_swa_averages_the_statistics_at_the_ends_of_epochs():
    seen = fitted(SWA(2), 3)
    torch.testing.assert_close(seen.validated[-1], (seen.after[7] + seen.after[11]) / 2)
