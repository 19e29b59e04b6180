"""Tests of all recipes of configs/recipe/."""

import json
import signal

import pytest

from cifarnet.config import CONFIGS, validate
from cifarnet.errors import Interrupted, UserError
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, assert_same_weights, signal_at

# recipes that need a setting, such as a teacher, have separate tests
RECIPES = sorted(path.stem for path in CONFIGS.glob("recipe/*.yaml") if "???" not in path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("+recipe=cutmix", "data.mix.prob=1.5"),
        ("+recipe=cutmix", "data.mix.mixup_alpha=0"),
        *(("+recipe=mixup", f"data.mix.alpha={alpha}") for alpha in (0, -1, "nan")),
        ("+recipe=erasing", "data.transforms.erasing.prob=2"),
        ("+recipe=randaugment", "data.transforms.randaugment.magnitude=31"),
        ("+recipe=jitter", "data.transforms.jitter.contrast=2"),
        ("+recipe=distillation module.teacher.checkpoint=run", "module.teacher.temperature=0"),
        ("+recipe=ema", "recipe.ema.decay=1"),
        ("+recipe=swa", "recipe.swa.epoch=0"),
        ("+recipe=lookahead", "recipe.lookahead.k=0"),
        ("+recipe=sam", "recipe.sam.rho=0"),
        ("+recipe=adversarial", "recipe.adversarial.eps=0"),
        ("+recipe=adversarial", "recipe.adversarial.step_size=0"),
        ("objective=focal", "objective.gamma=-1"),
    ],
)
def test_settings_out_of_range_are_refused(config, choice, setting):
    with pytest.raises(UserError) as error:
        validate(config(*choice.split(), setting))
    assert str(error.value).startswith(setting)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        *(f"+recipe={recipe}" for recipe in RECIPES),
        *("+recipe=[trivialaugment,erasing,cutmix,ema,clip]", "scheduler=warmup_cosine", "scheduler=step"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, recipe):
    recipe = [recipe, "trainer.max_epochs=3", "model.drop_rate=0.2", "optimizer.lr=0.02"]
    train(config(*recipe, folder="whole"))
    with pytest.raises(Interrupted):
        train(config(*recipe, signal_at(1, 2, signal.SIGINT), folder="parts"))
    train(*resume(tmp_path / "parts", [ALLOW_SIGNAL]))
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_weights(tmp_path / "whole/checkpoints" / name, tmp_path / "parts/checkpoints" / name)
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole["history"] == parts["history"]
    assert whole["test_accuracy"] == parts["test_accuracy"]
