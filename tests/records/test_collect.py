"""The record of a finished run."""

import json

from cifarnet import build
from cifarnet.callbacks.compilation import Compile
from cifarnet.train import train


class Compiled(Compile):
    """Takes two seconds."""

    def on_train_start(self, trainer, pl_module):
        self.seconds = 2.0


def test_the_times_before_training_are_recorded(config, tmp_path, monkeypatch):
    made = build.make_network
    monkeypatch.setattr(build, "make_network", lambda *made_from, **more: (made(*made_from, **more)[0], 12.5))
    train(config("data.train_size=100", "trainer.max_epochs=1", "scheduler=constant"), callbacks=[Compiled()])
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (record["fit_seconds"], record["compile_seconds"]) == (12.5, 2)
