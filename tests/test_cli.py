import json
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from cifarnet import cli
from cifarnet.train import main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "named", "remedy"),
    [
        (["optimizer.lrr=0.1"], "Could not override 'optimizer.lrr'", "use +optimizer.lrr=0.1"),
        (["+experiment=basline"], "Could not find 'experiment/basline'", "baseline"),
        (["model=resnet"], "Could not find 'model/resnet'", "cnn"),
        (["trainer.max_epochs=many"], "trainer.max_epochs=many", "expected a whole number"),
        (["optimizer.lr=fast"], "optimizer.lr=fast", "expected a number"),
        (["data.batch_size=2.5"], "data.batch_size=2.5", "expected a whole number"),
        (["data.flip=perhaps"], "data.flip=perhaps", "none, random, alternating"),
        (["module.tta=rotate"], "tta=rotate", "none, mirror, mirror_translate"),
        (["data.train_sizes=[]"], "data.train_sizes=[]", "[24,32]"),
        (["trainer.deterministic=[1]"], "trainer.deterministic=[1]", "expected true or false"),
        (["compile=perhaps"], "compile=perhaps", "expected true or false"),
        (["threads=0"], "threads=0", "whole number"),
        (["trainer.precision=bf8"], "trainer.precision=bf8", "bf16-mixed"),
        (["model.widths=64"], "model.widths=64", "expected a list"),
        (["seed=x"], "seed=x", "expected a whole number"),
        (["model.widths=[4,4,8]"], "widths=[4, 4, 8]", "even number"),
        (["+optimizer.lrr=1"], "lrr", "optimizer"),
        (["trainer.max_epochs=0"], "total_steps", "0"),
        (["trainer.max_epochs=1"], "scheduler of 5 steps", "division by zero"),  # too few for a warm-up of 20 %
        (["name=1"], "name=1", "folder"),
        (["optimizer.lr=-1"], "Invalid learning rate: -1", "optimizer"),
        (["data.batch_size=181"], "data.batch_size=181 is larger than an epoch of 180", "180 or less"),
        (["data.hardest_share=0"], "data.hardest_share=0", "such as 0.5"),
        (["data=folder"], "data.root is needed", "data.root="),
        (["ckpt_path=nothing.ckpt"], "no checkpoint nothing.ckpt", "last.ckpt"),
        (["~model"], "model names nothing to build", "--help"),
        (["model._target_=nets.Mine"], "nets.Mine", "model"),
        (["trainer.devices=2"], "trainer.devices=2", "Use 1"),
        (["optimizer.lr=0.1,"], "optimizer.lr=0.1,", ""),
        (["scheduler=null"], "group override must be a string", ""),
        pytest.param(
            ["trainer=gpu"],
            "trainer.accelerator=gpu",
            "trainer=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_one_message(command, arguments, named, remedy):
    section = {"data=folder": "data", "~model": "model"}.get(arguments[0], "-")  # whose settings do not apply
    status, _, error = command(*[setting for setting in SMALL if not setting.startswith(section)], *arguments)
    assert status == 1
    assert named in error
    assert remedy in error
    assert "Traceback" not in error


def test_output_folder_that_cannot_be_made(command, tmp_path):
    (tmp_path / "taken").write_text("a file")
    status, _, error = command(*SMALL, "hydra.run.dir=taken/run")
    assert status == 1
    assert "taken" in error
    assert "hydra.run.dir=" in error
    assert "Traceback" not in error


def test_no_network_names_the_way_out(command):
    status, _, error = command("+experiment=baseline", "data.url=http://127.0.0.1:9/cifar-10-python.tar.gz")
    assert status == 1
    for needed in ("127.0.0.1:9", "c58f30108f718f92721af3b95e74349a", "data.url=", "data=synthetic"):
        assert needed in error
    assert "Traceback" not in error


def test_full_error_shows_the_traceback(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cifarnet.train", "optimizer.lrr=1"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="lrr"):
        main()


def test_resuming_repeats_the_runs_own_overrides(command, tmp_path):
    stop = "+callbacks.signal={_target_: conftest.SignalAt, epoch: 0, batch: 2, number: 2}"
    status, _, error = command(*SMALL, "trainer.max_epochs=3", "name=mine", stop)
    assert status == 130, error
    (run,) = (tmp_path / "lightning_logs/mine").iterdir()
    assert f"python -m cifarnet.train ckpt_path={run}/checkpoints/last.ckpt" in error
    status, _, error = command(f"ckpt_path={run}/checkpoints/last.ckpt")
    assert status == 0, error
    assert list((tmp_path / "lightning_logs/mine").iterdir()) == [run]  # it went on in that run's folder
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["epochs"] == 3
    assert metrics["config"]["model"]["hidden"] == 16


def test_arguments_beat_saved_overrides(tmp_path):
    saved = ["--config-dir=mine", "+experiment=quickstart", "optimizer.lr=0.1", "seed=3"]
    config = {"data": {}, "module": {}, "trainer": {"precision": "32-true"}}
    recipe = {"cifarnet": "0.1.0", "model": {}, "class_names": [], "config": config, "overrides": saved}
    torch.save({"state_dict": {}, "epoch": 0, "hyper_parameters": recipe}, tmp_path / "last.ckpt")
    resume = f"ckpt_path='{tmp_path}/last.ckpt'"
    assert cli.with_saved_overrides(["--cfg", "job", resume, "optimizer.lr=0.2"]) == [
        *("--cfg", "job", "--config-dir=mine", "+experiment=quickstart", "seed=3", resume, "optimizer.lr=0.2"),
    ]
    assert cli.with_saved_overrides(["seed=1"]) == ["seed=1"]


def test_refused_resume_changes_nothing(command, tmp_path):
    stop = "+callbacks.signal={_target_: conftest.SignalAt, epoch: 0, batch: 2, number: 2}"
    status, _, error = command(*SMALL, "hydra.run.dir='my runs (a)'", stop)
    assert status == 130
    resume = shlex.split(error.split("cifarnet.train ")[-1])  # as a shell would read the printed command
    status, _, error = command(*resume, "trainer.max_epochs=5")
    assert status == 1
    assert "scheduler.total_steps was 10, now 25" in error
    status, _, error = command(*resume)
    assert status == 0, error
    assert (tmp_path / "my runs (a)/metrics.json").exists()


def test_ctrl_c_ends_a_sweep(command, tmp_path):
    stop = "+callbacks.signal={_target_: conftest.SignalAt, epoch: 0, batch: 2, number: 2}"
    status, _, _ = command("-m", *SMALL, "optimizer.lr=0.01,0.1", stop)
    assert status == 130
    (sweep,) = (tmp_path / "lightning_logs/train").iterdir()
    assert not (sweep / "1").exists()


def test_multirun_gives_each_job_a_folder(command, tmp_path):
    status, _, error = command("-m", *SMALL, "optimizer.lr=0.01,0.1")
    assert status == 0, error
    (sweep,) = (tmp_path / "lightning_logs/train").iterdir()
    rates = [json.loads((sweep / job / "metrics.json").read_text())["config"]["optimizer"]["lr"] for job in "01"]
    assert rates == [0.01, 0.1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send itself these signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_a_process_after_saving(tmp_path, number, status):
    arguments = [*SMALL, "trainer.max_epochs=100000", f"hydra.run.dir={tmp_path}/run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifarnet.train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Epoch 2/"):
            process.send_signal(number)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == status, error
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert f"ckpt_path={last}" in error
    assert torch.load(last, weights_only=True)["global_step"] >= 10
    assert "Traceback" not in error


def test_help_and_config_need_no_torch():
    program = "import sys; from cifarnet.train import main; main(); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "+experiment=baseline" in result.stdout


def test_wheel_brings_its_configs_and_trains(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    result = subprocess.run(
        [sys.executable, "-m", "cifarnet.train", *SMALL, "hydra.run.dir=run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/metrics.json").read_text())["git_commit"] is None
