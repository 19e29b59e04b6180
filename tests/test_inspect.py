"""The command `python -m cifarnet.inspect`."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from cifarnet.cli import compose
from cifarnet.inspect import inspect, main
from conftest import SMALL

FAST = [*SMALL, "threads=1", "hydra.run.dir=inspected"]
PICTURES = {"learning_rate.png", "augmented_batches.png"}


def test_command_prints_and_draws_and_writes_only_its_folder(command, tmp_path):
    test = ["lr_find=true", "lr_min=0.001", "lr_max=0.1", "lr_steps=10"]
    status, printed, error = command(*FAST, *test, "depth=1", main=main)
    assert status == 0, error
    table, epoch = printed.split("  epoch")
    rows = [line.split()[0] for line in table.splitlines() if re.match("  [a-z(]", line)]
    assert rows == ["layer", "(network)", "normalize", "features", "hidden", "head"]
    assert epoch.split()[:2] == ["5", "steps,"]
    for text in ("images/s", "s for 10 steps", "MiB", "Suggestion of the range test: "):
        assert text in epoch
    written = {
        path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file() and ".hydra" not in path.parts
    }
    assert written == {Path("inspected", name) for name in (*PICTURES, "lr_find.png", "inspect.log")}
    assert printed.strip().splitlines()[-1] in (tmp_path / "inspected/inspect.log").read_text()


@pytest.mark.parametrize(
    ("steps", "overrides"),
    [
        (5, ["+recipe=[sam,mixup,clip]"]),
        (5, ["+recipe=[ema,cutmix,no_decay]"]),
        (3, ["data.val_fraction=0", "~logger", "data.train_sizes=[16,32]", "data.hardest_share=0.5"]),
        (5, ["trainer.max_epochs=-1", "scheduler=constant", "callbacks=lean", "trainer.check_val_every_n_epoch=1"]),
        (5, ["+trainer.min_epochs=2", "+trainer.min_steps=50", "trainer.max_epochs=20"]),
        (1, ["+trainer.fast_dev_run=true"]),
    ],
    ids=str,
)
def test_other_settings(command, tmp_path, steps, overrides):
    status, printed, error = command(*FAST, *overrides, main=main)
    assert status == 0, error
    assert re.search(rf"^  epoch +{steps} steps, {steps} batches of 32 images$", printed, re.M)
    assert {path.name for path in (tmp_path / "inspected").glob("*.png")} == PICTURES


def test_fine_tuning(command, run, tmp_path):
    settings = [setting for setting in FAST if not setting.startswith("model.")]
    tuned = ["+experiment=finetune", f"model.checkpoint={run}", "data=synthetic"]
    test = ["lr_find=true", "lr_min=0.001", "lr_max=0.1", "lr_steps=10"]
    status, printed, error = command(*settings, *tuned, *test, main=main)
    assert status == 0, error
    assert f"Starts from the weights of {run}" in printed
    assert "Suggestion of the range test: " in printed


def test_use_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = compose("inspect", [*SMALL, "threads=1", "name=mine"])
    inspect(config)
    assert {path.name for path in Path(config.output_dir).iterdir()} == PICTURES
    assert re.fullmatch(r"lightning_logs/mine/inspect_[\d_-]+", config.output_dir)
    assert "images/s" in capsys.readouterr().out


def test_several_processes_are_refused(command, monkeypatch):
    monkeypatch.setattr("cifarnet.inspect.distributed.placement", lambda: SimpleNamespace(world_size=2, rank=0))
    status, _, error = command(*FAST, main=main)
    assert status == 1
    assert "without torchrun or srun" in error


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [
        (["-m"], "-m", "Remove"),
        (["ckpt_path=run"], "ckpt_path=run", "Remove"),
        (["trainer=ddp", "trainer.devices=2"], "has 2", "trainer.devices=1"),
        (["lr_min=1", "lr_max=0.1"], "lr_min=1", "lr_max=0.1"),
        (["lr_min=0"], "lr_min=0", "above 0"),
        (["lr_steps=1"], "lr_steps=1", "at least 10"),
        (["lr_find=true", "optimizer.lr=0"], "optimizer.lr, which is 0", "Set optimizer.lr="),
        (["depth=0"], "depth=0", "at least 1"),
        (["lr_fnd=true"], "lr_fnd", "Did you mean lr_find?"),
        (["+trainer.limit_train_batches=0", "scheduler=constant"], "no training batches", "limit_train_batches"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0", "1 or more"),
    ],
)
def test_errors(command, tmp_path, arguments, value, remedy):
    status, _, error = command(*FAST, *arguments, main=main)
    assert status == 1
    assert value in error
    assert remedy in error
    assert len(error.splitlines()) == 1


def test_results_of_a_run_are_kept(command, tmp_path):
    (tmp_path / "inspected").mkdir()
    (tmp_path / "inspected/metrics.json").write_text("{}")
    status, _, error = command(*FAST, main=main)
    assert status == 1
    assert "results of another run" in error


def test_settings_of_train_are_those_of_train(command):
    status, printed, error = command("+experiment=speedrun", "--cfg", "job", main=main)
    assert status == 0, error
    inspected = OmegaConf.create(printed)
    status, printed, error = command("+experiment=speedrun", "--cfg", "job")
    assert status == 0, error
    trained = OmegaConf.create(printed)
    assert {key: value for key, value in inspected.items() if key in trained} == trained
    assert {*inspected} - {*trained} == {"depth", "lr_find", "lr_min", "lr_max", "lr_steps"}
