import pytest
import torch

from cifarnet.errors import UserError
from cifarnet.train import train
from conftest import weights


def test_a_frozen_part_does_not_change(config, tmp_path):
    freeze = "+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: features.0, epoch: 2}"
    train(config("trainer.max_epochs=1", "scheduler=constant", folder="one"))
    train(config("trainer.max_epochs=3", "scheduler=constant", freeze))
    after_one, in_the_end = (weights(tmp_path / run / "checkpoints/last.ckpt") for run in ("one", "run"))
    assert torch.equal(after_one["network.features.0.weight"], in_the_end["network.features.0.weight"])
    assert not torch.equal(after_one["network.features.2.weight"], in_the_end["network.features.2.weight"])

    with pytest.raises(UserError, match=r"part=stem; .*normalize, features"):
        train(config(freeze.replace("features.0", "stem"), folder="stem"))
