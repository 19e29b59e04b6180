import time

from lightning.pytorch.callbacks import Callback


class Slow(Callback):
    """Slows a run down, so that it can be stopped; the results do not depend on it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        time.sleep(self.seconds)
