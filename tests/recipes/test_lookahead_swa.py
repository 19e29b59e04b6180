import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.errors import UserError
from cifarnet.recipes.swa import update_mean
from cifarnet.train import train
from conftest import weights

SHORT = ["data.train_size=100", "data.batch_size=30", "scheduler=constant"]  # 3 steps in an epoch


class Seen(Callback):
    """Records a weight before the first step and after each one, after the recipes."""

    def __init__(self):
        self.after = []

    def on_train_start(self, trainer, module):
        self.first = module.network.hidden[1].weight.detach().clone()

    def on_train_batch_end(self, trainer, module, *_):
        self.after.append(module.network.hidden[1].weight.detach().clone())


def test_slow_weights_are_updated_after_every_second_step(config):
    seen, alone = Seen(), Seen()
    lookahead = ["+recipe=lookahead", "recipe.lookahead.k=2", "recipe.lookahead.alpha=0.2"]
    train(config(*SHORT, *lookahead, "trainer.max_epochs=1"), callbacks=[seen])
    train(config(*SHORT, "trainer.max_epochs=1", folder="alone"), callbacks=[alone])
    assert torch.equal(seen.after[0], alone.after[0])
    torch.testing.assert_close(seen.after[1], seen.first + 0.2 * (alone.after[1] - seen.first))
    assert not torch.equal(seen.after[2], seen.after[1])


def test_frozen_weights_do_not_change(config):
    freeze = "+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: hidden, epoch: 2}"
    seen = Seen()
    train(config(*SHORT, "+recipe=lookahead", "recipe.lookahead.k=2", freeze, "trainer.max_epochs=2"), callbacks=[seen])
    assert not torch.equal(seen.first, seen.after[2])
    assert all(torch.equal(weight, seen.after[2]) for weight in seen.after[3:])


def test_swa_is_the_mean_of_the_last_epochs(config, tmp_path):
    seen = Seen()
    train(config(*SHORT, "+recipe=swa", "recipe.swa.epoch=2", "trainer.max_epochs=3"), callbacks=[seen])
    mean = (seen.after[5] + seen.after[8]) / 2
    torch.testing.assert_close(weights(tmp_path / "run/checkpoints/last.ckpt")["network.hidden.1.weight"], mean)


def test_swa_copies_integers():
    """torch cannot divide integers on a GPU, such as the number of batches of a batch norm."""
    floats, counts = [torch.tensor([1.0, 2.0])], [torch.tensor(10)]
    update_mean(floats, [torch.tensor([4.0, 2.0])], torch.tensor(2))
    update_mean(counts, [torch.tensor(20)], torch.tensor(2))
    assert floats[0].tolist() == [2, 2]
    assert counts[0].item() == 20


def test_two_averages_are_refused(config):
    """Each swaps its average with the network for validation; training would continue with an average."""
    with pytest.raises(UserError, match=r"EMA and SWA .* only one"):
        train(config(*SHORT, "+recipe=[ema,swa]"))
