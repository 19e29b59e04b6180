import time

from lightning.pytorch.callbacks import Callback


class Slow(Callback):
    """Gives time to stop a run in its middle, which its figures do not depend on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        time.sleep(self.seconds)
