import json
import re
import signal
import struct
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context

from cifarnet.build import make_trainer
from cifarnet.errors import Interrupted, UserError
from cifarnet.inference import figures as inference_figures
from cifarnet.records import figures
from cifarnet.records.record import Record
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import ALLOW_SIGNAL, SMALL, signal_at

PICTURES = ["train/augmented_batch", "whole_run/confusion_matrix", "whole_run/predictions"]
RESULTS = {  # in the order in which TensorBoard shows them
    "accuracy_test": "test_accuracy",
    "accuracy_val": "val_accuracy",
    "cross_entropy_test": "test_cross_entropy",
    "seconds": "seconds",
}


def results(folder) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {f"whole_run/{name}": pytest.approx(metrics[key]) for name, key in RESULTS.items()}


@pytest.mark.parametrize("picture", ["accuracy", "predictions"])
def test_a_picture_that_fails_does_not_cost_the_record(config, tmp_path, monkeypatch, picture):
    def fail(*_, **__):
        raise RuntimeError("cannot be drawn")

    for module in (figures, inference_figures):
        if hasattr(module, picture):
            monkeypatch.setattr(module, picture, fail)
    with pytest.raises(RuntimeError, match="cannot be drawn"):
        train(config())
    assert Record.read(tmp_path / "run/metrics.json").epochs == 2


def hparams(folder):
    """The columns of the HParams tab, as TensorBoard's own backend finds them, and the groups of all other tags."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
    rows = context.hparams_metadata(RequestContext(), "")
    found = context.experiment_from_metadata(RequestContext(), "", True, rows, [])
    tags = {tag for run in multiplexer.Runs().values() for tag in run["tensors"] if not tag.startswith("_hparams_")}
    return found, sorted({tag.partition("/")[0] for tag in tags})


def test_the_hparams_tab_shows_varied_settings_and_results(config, tmp_path):
    for number, varied in enumerate([[], ["model.hidden=8"], ["+recipe=mixup"]]):
        train(config(*varied, folder=f"runs/{number}"))
    found, groups = hparams(tmp_path / "runs")
    assert [info.name for info in found.hparam_infos if info.differs] == ["model.hidden"]
    names = {info.name for info in found.hparam_infos}
    assert {"data.mix.alpha", "optimizer.lr", "seed"} < names
    assert not [name for name in names if name.startswith("callbacks")]
    assert [info.name.tag for info in found.metric_infos] == [f"whole_run/{name}" for name in RESULTS]
    assert groups == ["train", "val", "whole_run"]  # the order in which TensorBoard shows them


def test_the_hparams_tab_shows_no_choice_of_callbacks(command, tmp_path):
    detailed = ["callbacks=detailed", *(f"callbacks.{name}=null" for name in ("graph", "embeddings", "pr_curves"))]
    stopping = (
        "+callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/accuracy, mode: max}"
    )
    varied = [*SMALL, "threads=1", "trainer.max_epochs=1", "scheduler=constant"]
    assert command(*varied, *detailed, "hydra.run.dir=runs/0")[0] == 0
    assert command(*varied, stopping, "+callbacks.early.patience=5", "hydra.run.dir=runs/1")[0] == 0
    found, _ = hparams(tmp_path / "runs")
    names = {setting.partition("=")[0] for setting in varied}
    assert {info.name for info in found.hparam_infos} == {*names, "callbacks.early.patience"}


def test_the_hparams_tab_of_a_sweep_shows_the_settings_of_the_command(command, tmp_path):
    varied = ["model.hidden=8,16", "scheduler=linear,constant"]
    assert command(*SMALL, "threads=1", *varied, "-m", "hydra.sweep.dir=sweep")[0] == 0
    found, _ = hparams(tmp_path / "sweep")
    names = {setting.partition("=")[0] for setting in [*SMALL, "threads=1", *varied]}
    assert {info.name for info in found.hparam_infos} == names
    assert {info.name for info in found.hparam_infos if info.differs} == {"model.hidden", "scheduler"}
    assert sorted(next(info for info in found.hparam_infos if info.name == "scheduler").domain_discrete) == [
        "constant",
        "linear",
    ]
    assert [info.name.tag for info in found.metric_infos] == [f"whole_run/{name}" for name in RESULTS]


def test_several_loggers_log_everything(config, tmp_path):
    train(config("logger=[tensorboard,csv]"))
    run = tmp_path / "run"
    header, *rows, last = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    curves = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["step"], row["val/accuracy"] != "", row["whole_run/seconds"]) for row in curves] == [
        ("1", True, ""),
        ("2", True, ""),
    ]
    kept = {key: float(value) for key, value in zip(header, last, strict=True) if value and key != "step"}
    assert kept == results(run)
    assert list(run.glob("events.*"))
    settings = OmegaConf.load(run / "hparams.yaml")
    assert (settings.optimizer.lr, settings.scheduler.max_lr, settings.scheduler.total_steps) == (0.05, 0.05, 10)
    assert "logger" not in settings
    for picture in PICTURES:
        assert (run / f"{picture.partition('/')[2]}.png").read_bytes().startswith(b"\x89PNG")


def test_the_hparams_file_of_tensorboard_contains_the_settings(config, tmp_path):
    train(config("trainer.max_epochs=1", "scheduler=constant", "callbacks.pictures=null"))
    settings = OmegaConf.load(tmp_path / "run/hparams.yaml")
    assert (settings.optimizer.lr, settings.data.batch_size) == (0.05, 32)


def test_the_section_logger_may_be_a_single_logger(config):
    settings = config("~logger", "+logger={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: logs}")
    assert [type(logger).__name__ for logger in make_trainer(settings).loggers] == ["CSVLogger"]


def test_mlflow_logs_everything(config, tmp_path):
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    with pytest.raises(Interrupted):
        train(config("logger=mlflow", signal_at(1, 1, signal.SIGTERM)))
    train(*resume(tmp_path / "run", [ALLOW_SIGNAL]))
    [experiment] = [one for one in client.search_experiments() if one.name == "train"]
    run, stopped = client.search_runs([experiment.experiment_id])
    assert (run.info.status, stopped.info.status) == ("FINISHED", "FAILED")
    assert (run.data.params["optimizer/lr"], run.data.params["scheduler/total_steps"]) == ("0.05", "10")
    assert run.data.metrics.items() >= results(tmp_path / "run").items()
    curve = client.get_metric_history(run.info.run_id, "val/accuracy")
    assert [point.step for point in curve] == [1, 2]  # also that of the first session
    assert [file.path for file in client.list_artifacts(run.info.run_id, "whole_run")] == [
        f"{name}.png" for name in PICTURES[1:]
    ]
    assert not (tmp_path / "mlruns").exists()


def offline_records(file):
    """The records in a file of Weights & Biases, which has the block format of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, part = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if place + 7 + size > len(content):  # not yet written to its end
            return
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a complete record, or its last part
            yield Record.FromString(part)
            part = b""


def test_wandb_logs_everything(config, tmp_path):
    pytest.importorskip("wandb")
    for seed in (0, 1):  # as a sweep does, in one process
        train(config("logger=wandb", f"seed={seed}", folder=f"run{seed}"))
        [file] = (tmp_path / f"run{seed}/wandb").rglob("*.wandb")
        records, over = [], time.monotonic() + 20  # written by another process, for which `finish` does not wait
        while time.monotonic() < over and not any(one.WhichOneof("record_type") == "exit" for one in records):
            records = list(offline_records(file))
        config_ = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
        assert (config_["seed"], config_["optimizer"]["lr"]) == (seed, 0.05)
        rows = [
            {"/".join([item.key, *item.nested_key]): json.loads(item.value_json) for item in record.history.item}
            for record in records
        ]
        logged = [{key.strip("/"): value for key, value in row.items()} for row in rows]
        assert [row["trainer/global_step"] for row in logged if "val/accuracy" in row] == [1, 2]
        assert any(row.items() >= results(tmp_path / f"run{seed}").items() for row in logged)
        files = [item.path for record in records for item in record.files.files]
        assert all(any(name in file for file in files) for name in PICTURES)
        assert records[-1].WhichOneof("record_type") == "exit"


def test_tensorflow_is_not_imported(tmp_path):
    """TensorBoard would import it if it were installed, and it prints messages."""
    (tmp_path / "tensorflow.py").write_text("print('chatter')\nraise ImportError")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from cifarnet.train import main; main()"
    settings = [*SMALL, "hydra.run.dir=run"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *settings], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "chatter" not in done.stdout + done.stderr
    assert list((tmp_path / "run").glob("events.*"))


@pytest.mark.parametrize("resumed", [False, True])
def test_reports_of_profilers_are_printed(command, resumed):
    short = [*SMALL, "trainer.max_epochs=1", "callbacks.pictures=null", "scheduler=constant", "hydra.run.dir=run"]
    if resumed:
        command(*short)
        short = ["ckpt_path=run", "trainer.max_epochs=2"]
    status, printed, _ = command(*short, "+trainer.profiler=simple")
    assert status == 0
    assert printed.count("Profiler Report") == 2  # fit, test
    assert "run_training_batch" in printed


@pytest.mark.parametrize("character", "/\\#?%:")
def test_names_that_wandb_refuses(config, character):
    with pytest.raises(UserError, match=f"project=a.b: WandbLogger cannot use .*{re.escape(character)}"):
        make_trainer(config("logger=wandb", f"name='a{character}b'"))


@pytest.mark.parametrize("character", "?#")
def test_folders_in_which_mlflow_would_write_elsewhere(config, tmp_path, character):
    with pytest.raises(UserError, match="MLFlowLogger cannot use"):
        make_trainer(config("logger=mlflow", f"output_dir='{tmp_path}/a{character}b'"))
    assert not list(tmp_path.iterdir())
