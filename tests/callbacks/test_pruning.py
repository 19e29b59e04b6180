import contextlib
import json

import pytest

from cifarnet.callbacks.pruning import Prune
from cifarnet.errors import Pruned
from cifarnet.train import train


class Trial:
    """Records what an Optuna trial receives; `prunes`: whether its study's pruner stops it."""

    def __init__(self, prunes: bool) -> None:
        self.reported, self.prunes = {}, prunes

    def report(self, value: float, step: int) -> None:
        assert step not in self.reported  # a study keeps the first value of a step
        self.reported[step] = value

    def should_prune(self) -> bool:
        return self.prunes


@pytest.mark.parametrize("overrides", [[], ["+trainer.val_check_interval=1", "+trainer.num_sanity_val_steps=1"]])
def test_a_trial_receives_the_validation_accuracy_of_each_epoch(config, tmp_path, overrides):
    trial = Trial(prunes=False)
    train(config("optimizer.lr=0.02", "trainer.max_epochs=3", *overrides), callbacks=[Prune(trial)])
    history = json.loads((tmp_path / "run/metrics.json").read_text())["history"]
    assert trial.reported == {row["epoch"]: row["val/accuracy"] for row in history}
    assert len(trial.reported) == 3


@pytest.mark.parametrize(("epochs", "pruned"), [(2, True), (1, False)])
def test_a_trial_is_pruned_before_its_last_epoch(config, tmp_path, epochs, pruned):
    settings, trial = config(f"trainer.max_epochs={epochs}", "scheduler=constant"), Trial(prunes=True)
    with pytest.raises(Pruned, match="after epoch 1 of 2") if pruned else contextlib.nullcontext():
        train(settings, callbacks=[Prune(trial)])
    assert list(trial.reported) == [1]
    assert (tmp_path / "run/metrics.json").exists() == (not pruned)
