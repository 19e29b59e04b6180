import errno
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
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cifarnet import cli, trained
from cifarnet.system import files
from cifarnet.train import main
from conftest import ALLOW_SIGNAL, SMALL, signal_at

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [
        (["optimizer.lrr=0.1"], "optimizer.lrr", "Did you mean optimizer.lr?"),
        (["batch_size=7"], "batch_size", "Did you mean data.batch_size?"),
        (["+data.batchsize=7"], "data.batchsize=7", "Did you mean batch_size?"),
        (["+experimnt=baseline"], "experimnt", "Did you mean experiment?"),
        (["+sweep.resum=x"], "sweep.resum", "Did you mean resume?"),
        (["name=it's"], "name=it's cannot be parsed", "quote it: 'name="),
        (["optimizer.lr=nan"], "optimizer.lr=nan", "finite"),
        (["+trainer.gradient_clip_val=inf"], "trainer.gradient_clip_val=inf", "finite"),
        (["+trainer.gradient_clip_val=-0.5"], "trainer.gradient_clip_val=-0.5", "above 0"),
        (["+trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0", "at least 1"),
        (["+trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch=0", "at least 1"),
        (["+trainer.default_root_dir=there"], "trainer.default_root_dir=there", "hydra.run.dir=…"),
        (["threads=100000"], "threads=100000", "at least 1 and at most 1,024"),
        (["--experiment=baseline"], "--experiment=baseline", "without dashes"),
        (["--experimental-rerun", "missing.pickle"], "--experimental-rerun", "ckpt_path=<run>"),
        (["--package", "trainer"], "--package trainer", "--cfg job"),
        (["seed=4294967296"], "seed=4294967296", "at least 0 and at most 4,294,967,295"),
        (["optimizer._target_=torch.optim.RMSprop"], "optimizer.nesterov=True", "'~optimizer' '+opt"),
        (["model._target_=math"], "model._target_=math", "no such class or function"),
        (["~model", "+model={_target_: fractions.Fraction}"], "model: a Fraction", "torch.nn.Module"),
        (
            ["~data", "+data={_target_: torch.nn.Linear, in_features: 1, out_features: 1}"],
            "data builds Linear",
            "ImageDataModule",
        ),
        (["+callbacks.mine={_target_: builtins.list}"], "builtins.list builds list", "expected Callback"),
        (["++callbacks._target_=builtins.list"], "callbacks._target_=builtins.list", "_target_"),
        (
            ["+callbacks.mine={_target_: lightning.pytorch.callbacks.Timer, duration: {minutes: 5}}"],
            "Missing key total_seconds",
            "callbacks.mine",
        ),
        (["+callbacks.mine=3"], "callbacks.mine=3", "_target_"),
        (["+experiment=basline"], "experiment=basline does not exist", "Did you mean baseline?"),
        (["model=resnet"], "model=resnet does not exist", "Choose one of these: cct7_3x1, cnn"),
        (["trainer.max_epochs=many"], "trainer.max_epochs=many", "expected a whole number"),
        (["optimizer.lr=fast"], "optimizer.lr=fast", "expected a number"),
        (["data.batch_size=2.5"], "data.batch_size=2.5", "expected a whole number"),
        (["data.flip=perhaps"], "data.flip=perhaps", "none, random or alternating"),
        (["module.tta=rotate"], "tta=rotate", "none, mirror or mirror_translate"),
        (["data.train_sizes=[]"], "data.train_sizes=[]", "at least 1"),
        (["trainer.deterministic=[1]"], "trainer.deterministic=[1]", "expected true, false"),
        (["compile=perhaps"], "compile=perhaps", "expected true, false"),
        (["threads=0"], "threads=0", "at least 1"),
        (["trainer.precision=bf8"], "trainer.precision=bf8", "bf16-mixed"),
        (["model.widths=64"], "model.widths=64", "expected a list"),
        (["seed=x"], "seed=x", "expected a whole number"),
        (["model.widths=[4,4,8]"], "widths=[4, 4, 8]", "even number"),
        (["+optimizer.lrr=1"], "optimizer.lrr=1", "Did you mean lr?"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 would train nothing", "1 or more"),
        (["trainer.max_epochs=-1"], "scheduler", "trainer.max_epochs"),
        (["+trainer.limit_train_batches=0"], "scheduler", "trainer.max_epochs"),
        (["trainer.precision=bf16-true"], "trainer.precision=bf16-true", "bf16-mixed"),
        (["scheduler=cosine", "scheduler.T_max=0"], "scheduler: step 1", "by zero"),
        (["callbacks.best.monitor=val/foo"], "val/foo", "val/accuracy"),
        (["+trainer.limit_val_batches=0.1"], "limit_val_batches", "Try at least"),
        (["trainer.max_epochs=1"], "5 steps", "Train longer"),  # too few for a warm-up of 20%
        (["name=1"], "name=1", "expected text"),
        (["seed=-1"], "seed=-1", "at least 0"),
        (["optimizer.lr=-1"], "Invalid learning rate: -1", "optimizer"),
        (["data.hardest_share=0"], "data.hardest_share=0", "above 0 and at most 1"),
        (["data=folder"], "data.root is required", "data.root="),
        (["ckpt_path=nothing.ckpt", "optimizer.lr=1"], "nothing.ckpt: no checkpoint found", "<run>/checkpoints/"),
        (["ckpt_path=nothing.ckpt"], "nothing.ckpt: no checkpoint found", "<run>/checkpoints/"),
        (["~model"], "model has no _target_", "--help"),
        (["model._target_=nets.Mine"], "model._target_=nets.Mine", "no such class"),
        (["+trainer.num_nodes=2"], "trainer.num_nodes=2", "torchrun or srun"),
        (["trainer.strategy=ddp_spawn", "trainer.devices=2"], "trainer.strategy=ddp_spawn", "Choose trainer=ddp"),
        (["trainer=ddp", "trainer.accelerator=cpu", "+trainer.sync_batchnorm=true"], "sync_batchnorm", "requires GPUs"),
        (["trainer.devices=text"], "trainer.devices=text", "int > 0"),
        (["trainer.devices=3000000000"], "trainer.devices=3000000000", "at least -1 and at most 4,096"),
        (["trainer.max_epochs=null"], "trainer.max_epochs=null", "use a number of epochs"),
        (["+trainer.val_check_interval=0"], "trainer.val_check_interval=0", "at least 1"),
        (["optimizer.lr=0.1,"], "optimizer.lr=0.1,", ""),
        (["scheduler=null"], "group override must be a string", ""),
        pytest.param(
            ["trainer=gpu"],
            "trainer.accelerator=gpu",
            "Choose trainer=auto, trainer=cpu or trainer=ddp",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_reported_in_one_line_with_its_value_and_a_remedy(command, arguments, value, remedy):
    # settings that do not apply
    section = {"data=folder": "data", "~data": "data", "~model": "model", "ckpt_path=nothing.ckpt": ""}.get(
        arguments[0], "-"
    )
    status, _, error = command(*[setting for setting in SMALL if not setting.startswith(section)], *arguments)
    assert status == 1
    [message] = error.splitlines()
    assert message.startswith("Error: ")
    assert value in message
    assert remedy in message


@pytest.mark.parametrize("mode", [[], ["-m"]], ids=["run", "sweep"])
def test_hydra_does_not_echo_the_command_before_a_message(command, mode):
    status, _, error = command(*mode, *SMALL, "optimizer.lr=-1")
    assert status == 1
    assert "Error: optimizer: Invalid learning rate: -1. Change its settings." in error.splitlines()
    assert "data.train_size=200" not in error


def test_a_folder_that_cannot_be_made_is_reported(command, tmp_path):
    (tmp_path / "taken").write_text("a file")
    status, _, error = command(*SMALL, "hydra.run.dir=taken/run")
    assert status == 1
    assert "taken" in error
    assert "hydra.run.dir=" in error
    assert "Traceback" not in error


def test_a_failed_download_is_reported_with_alternatives(command):
    status, _, error = command("+experiment=baseline", "data.url=http://127.0.0.1:9/cifar-10-python.tar.gz")
    assert status == 1
    for part in ("127.0.0.1:9", "c58f30108f718f92721af3b95e74349a", "data.url=", "data=synthetic"):
        assert part in error
    assert "Traceback" not in error


def test_hydra_full_error_shows_the_traceback(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cifarnet.train", "optimizer.lrr=1"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="lrr"):
        main()


STOP = signal_at(0, 2, signal.SIGINT)


def test_the_printed_command_resumes_in_the_folder_of_the_run(command, tmp_path):
    status, _, error = command(*SMALL, "trainer.max_epochs=3", "name='my runs (a)'", STOP)
    assert status == 130, error
    (run,) = (tmp_path / "lightning_logs/my runs (a)").iterdir()
    resume = shlex.split(error.split("cifarnet.train ")[-1])  # as a shell would read the printed command
    assert resume == [f"ckpt_path='{run}/checkpoints/last.ckpt'"]
    status, _, error = command(*resume, ALLOW_SIGNAL, "trainer.max_epochs=5")
    assert status == 1
    assert "OneCycleLR was planned for 3 epochs" in error
    assert not (run / "metrics.json").exists()
    status, _, error = command(*resume, ALLOW_SIGNAL)
    assert status == 0, error
    assert list((tmp_path / "lightning_logs/my runs (a)").iterdir()) == [run]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["epochs"] == 3
    assert metrics["config"]["model"]["hidden"] == 16
    assert "name='my runs (a)'" in metrics["overrides"]


def test_resuming_by_folder_keeps_the_choices_of_the_run(command, tmp_path):
    settings = ["trainer.max_epochs=1", "scheduler=constant", "hydra.run.dir=run", "callbacks.progress=null"]
    assert command(*SMALL, *settings)[0] == 0
    status, _, error = command("ckpt_path=run", "trainer.max_epochs=2", "threads=1")
    assert status == 0, error
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["epochs"], metrics["config"]["threads"]) == (2, 1)
    assert metrics["config"]["callbacks"]["progress"] is None


def test_two_runs_in_one_folder_are_refused(command, tmp_path):
    with files.exclusive(tmp_path / "run"):
        status, _, error = command(*SMALL, "hydra.run.dir=run")
    assert status == 1
    assert "Another process is using" in error
    assert "hydra.run.dir=" in error


def test_a_run_that_fails_before_training_leaves_no_folder(command, tmp_path):
    assert command(*SMALL, "optimizer.lr=-1")[0] == 1
    assert command(*SMALL, "data.flip=perhaps")[0] == 1
    assert command(*SMALL, "trainer.max_epochs=1")[0] == 1  # too few steps for the schedule
    assert list((tmp_path / "lightning_logs/train").iterdir()) == []


def test_the_log_file_has_the_lines_of_the_terminal(command, tmp_path):
    settings = ["trainer.max_epochs=2", "scheduler=constant", "hydra.run.dir=run"]
    status, printed, _ = command(*SMALL, *settings)
    assert status == 0
    log = (tmp_path / "run/train.log").read_text()
    shown = [line for line in printed.splitlines() if line.strip()]
    assert [line for line in shown if line not in log] == []
    assert "Epoch 2/2" in log
    assert "[20" not in printed  # dates are only in the log


def test_ctrl_c_ends_a_sweep(command, tmp_path):
    status, printed, _ = command("-m", *SMALL, "optimizer.lr=0.01,0.1", STOP)
    assert status == 130
    (sweep,) = (tmp_path / "lightning_logs/train").iterdir()
    assert not (sweep / "1").exists()
    assert "0 of 2 jobs done" in printed


def test_each_job_of_a_sweep_has_a_folder(command, tmp_path):
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


def raised(error: Exception, module: str) -> Exception:
    """Return the error after code of a module has raised it."""
    try:
        exec("raise error", {"__name__": module, "error": error})
    except type(error) as raised:
        return raised
    raise AssertionError


@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError, KeyError, OSError])
def test_bugs_are_not_explained_whatever_their_text_or_folder(kind):
    text = "lightning.pytorch: no compiler for hydra, in /lightning/hydra/trainer.py: No space left on device"
    for module in ("cifarnet.train", "lightningcopy.pytorch", "torch.nn"):
        assert cli.explain(raised(kind(text), module)) is None


def test_settings_that_libraries_refuse_are_explained():
    error = raised(ValueError("x must\nbe y"), "lightning.pytorch.trainer.trainer")
    assert cli.explain(error) == "trainer: x must be y"
    assert cli.explain(raised(ValueError("no such group"), "hydra.core.plugins")) == "no such group"
    assert cli.explain(raised(TypeError("x"), "lightning.pytorch.trainer.trainer")) is None


def test_a_full_disk_is_explained_wherever_it_is_the_cause():
    error = OSError(errno.ENOSPC, "No space left on device", "run/last.ckpt")
    outer = RuntimeError("the writer's thread has failed")
    outer.__cause__ = error
    for shown in (error, outer):
        assert "run/last.ckpt cannot be written: No space left on device" in str(cli.explain(shown))
    assert cli.explain(OSError(errno.ENOENT, "No such file", "x")) is None


def test_a_signal_before_training_is_a_failure(monkeypatch, capsys):
    def stopped():
        raise SIGTERMException

    with pytest.raises(SystemExit) as end:
        cli.run(stopped)
    assert end.value.code == 143
    assert "Stopped by SIGTERM" in capsys.readouterr().err


def test_the_environment_is_restored(command, monkeypatch):
    command("--help")
    assert "HYDRA_FULL_ERROR" not in os.environ
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit):
        cli.run(lambda: sys.exit(3))
    assert os.environ["HYDRA_FULL_ERROR"] == "0"


def test_arguments_are_paths_settings_or_paths_to_compare_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1").mkdir()
    arguments = ["a=1", "b", "metric=seconds", "+x=1", "~y", "--against", "c", "output=o.png"]
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    parsed = cli.parse("compare", "", against=True)
    assert parsed == (["a=1", "b"], ["metric=seconds", "+x=1", "~y", "output=o.png"], ["c"])
    monkeypatch.setattr(sys, "argv", ["evaluate", "tta=mirror"])
    with pytest.raises(SystemExit):
        cli.parse("evaluate", "")


TEXTS = ["a'b", 'a"b', "'x'", r"a\'b", "a\\", "a b=c,[d]", "${seed}", r"$\bad{$", "", "'", "x'"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_can_be_the_value_of_an_override(text):
    override = f"name={cli.literal(text)}"
    assert cli.value_of("name", ["name=x", override]) == text
    assert cli.compose("train", [override]).name == text
    (argument,) = shlex.split(cli.quoted("name", text))
    assert cli.value_of("name", [argument]) == text


@pytest.mark.parametrize("command", ["train", "search", "inspect", "evaluate", "audit", "compare", "predict"])
def test_help_is_quick_and_fits_a_screen(command):
    slow = "{'torch', 'lightning', 'scipy', 'matplotlib', 'optuna', 'pandas'}"
    program = f"""import sys, time
sys.argv = ['', '--help']
start = time.perf_counter()
from cifarnet.{command} import main
try:
    main()
except SystemExit as end:
    assert not end.code
loaded = {slow} & set(sys.modules)
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"python -m cifarnet.{command}" in result.stdout
    assert len(result.stdout.splitlines()) < 50


def test_the_config_is_printed_without_torch(tmp_path):
    program = "import sys; from cifarnet.train import main; main(); assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", program, "--cfg", "job", "+experiment=baseline"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "shuffle_seed: ${seed}" in result.stdout
    assert len(result.stdout.splitlines()) < 115
    assert not list(tmp_path.iterdir())


def test_options_can_stand_between_settings(command):
    status, printed, error = command("seed=3", "--cfg", "job", "threads=1")
    assert status == 0, error
    assert "seed: 3" in printed
    assert "threads: 1" in printed


def test_a_wheel_contains_the_configs_and_trains(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shipped = [path.parent.name for path in tmp_path.glob("site/cifarnet/trained/*/model.safetensors")]
    assert sorted(shipped) == trained.names()
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
