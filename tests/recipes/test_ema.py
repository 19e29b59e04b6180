import torch
from lightning.pytorch.callbacks import Callback

import cifarnet
from cifarnet.build import build
from cifarnet.train import train
from conftest import weights


class Averages(Callback):
    """Records the average of one weight, computed by hand, and the weight that is validated."""

    def __init__(self):
        self.average, self.validated = None, []

    def on_train_batch_end(self, trainer, module, *_):
        now = module.network.head.weight.detach().clone()
        self.average = now if self.average is None else 0.8 * self.average + 0.2 * now

    def on_validation_batch_start(self, trainer, module, *_):
        self.validated.append((self.average, module.network.head.weight.detach().clone()))


def test_the_average_is_validated_saved_and_loaded(config, tmp_path):
    averages = Averages()
    train(config("+recipe=ema", "recipe.ema.decay=0.8", "data.train_size=100"), callbacks=[averages])
    assert len(averages.validated) == 2
    for by_hand, validated in averages.validated:
        torch.testing.assert_close(validated, by_hand)
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert torch.equal(weights(last)["network.head.weight"], averages.validated[-1][1])
    network, _ = cifarnet.load(last)
    assert torch.equal(network.head.weight, averages.validated[-1][1])
    built = build(config("data.train_size=100"))
    assert torch.equal(network.normalize.std, built.classifier.network.normalize.std)  # constants are kept bit by bit
