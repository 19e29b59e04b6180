import csv
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import Study, load_study

from cifarnet import search
from cifarnet.errors import MachineFault
from cifarnet.sweeps import search as study_module
from conftest import ALLOW_SIGNAL, SMALL, signal_at

TINY = [*SMALL, "scheduler=constant", "callbacks.pictures=null", "~logger", "hydra.sweep.dir=search"]
RATE = "optimizer.lr=tag(log,interval(0.001,0.1))"


@pytest.fixture
def run(command):
    return lambda *arguments: command(*TINY, *arguments, main=search.main)


def study(folder: Path) -> Study:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return load_study(study_name=folder.name, storage=storage)


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in study(folder).trials]


def test_a_search_can_be_continued_with_more_trials(run, command, tmp_path):
    status, printed, error = run(RATE, "hydra.sweeper.trials=2")
    assert status == 0, error
    assert "2 of 2 jobs done" in printed
    first = [trial.params["optimizer.lr"] for trial in study(tmp_path / "search").trials]
    used = [json.loads((tmp_path / f"search/{n}/metrics.json").read_text()) for n in (0, 1)]
    assert [metrics["config"]["optimizer"]["lr"] for metrics in used] == first
    assert [trial.value for trial in study(tmp_path / "search").trials] == [m["val_accuracy"] for m in used]

    status, printed, error = run(RATE, "hydra.sweeper.trials=3")
    assert status == 0, error
    assert next(line for line in printed.splitlines() if line.startswith("Trial")).startswith("Trial 3 of 3")
    rates = [trial.params["optimizer.lr"] for trial in study(tmp_path / "search").trials]
    assert rates[:2] == first
    assert len(set(rates)) == 3
    assert len(list(csv.DictReader((tmp_path / "search/sweep.csv").open()))) == 3
    for name in ("history", "importances", "slices"):
        assert (tmp_path / f"search/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "search/sweep.png").exists()

    status, printed, error = command(
        "sweep.resume=search", "hydra.sweeper.trials=4", "hydra.sweeper.pruner=null"
    )  # as any other sweep
    assert status == 0, error
    assert "4 of 4 jobs done" in printed
    nothing = ["+trainer.enable_progress_bar=false", "classes=[mine.Network]", "threads=1"]  # decides the result
    status, printed, error = run(RATE, "hydra.sweeper.trials=4", *nothing)
    assert status == 0, error
    assert "Trial" not in printed

    status, _, error = run(RATE, "seed=1")
    assert status == 1
    assert "was created with other settings: seed=1" in error


def test_the_seed_determines_the_trials(run, tmp_path):
    for folder in ("one", "same"):
        run(RATE, "hydra.sweeper.trials=2", f"hydra.sweep.dir={folder}", "trainer.max_epochs=1")
    one, same = ([trial.params for trial in study(tmp_path / folder).trials] for folder in ("one", "same"))
    assert one == same


def test_a_trial_that_was_cut_off_continues(run, tmp_path):
    stop = signal_at(1, 2, signal.SIGTERM)
    status, _, _ = run(RATE, stop, "hydra.sweeper.trials=1")
    assert status == 143
    assert states(tmp_path / "search") == ["RUNNING"]

    status, printed, error = run(RATE, stop, "hydra.sweeper.trials=1")  # that batch is past
    assert status == 0, error
    assert "Trial 1 was interrupted and will be continued" in printed
    assert "Job 0 continues from search/0/checkpoints/last.ckpt" in printed
    assert states(tmp_path / "search") == ["COMPLETE"]


def test_pruned_trials(run, tmp_path):
    never = ["hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner", "+hydra.sweeper.pruner.lower=1.1"]
    status, printed, error = run(RATE, *never, "hydra.sweeper.trials=2")
    assert status == 0, error
    assert states(tmp_path / "search") == ["PRUNED", "PRUNED"]
    assert "0 of 2 jobs done, 2 pruned" in printed
    assert not list(tmp_path.glob("search/*/checkpoints"))
    rows = list(csv.DictReader((tmp_path / "search/sweep.csv").open()))
    assert [row["status"] for row in rows] == ["pruned", "pruned"]
    assert rows[0]["note"].startswith("after epoch 1 of 2, validation accuracy")

    status, printed, error = run(RATE, "hydra.sweeper.pruner=null", "hydra.sweeper.trials=3")
    assert status == 0, error
    assert states(tmp_path / "search")[2:] == ["COMPLETE"]


def test_a_search_that_another_process_stopped_draws_no_trials(run, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module.multirun, "begin", lambda config, folder: (folder / "stop").touch())
    status, _, error = run(RATE, "hydra.sweeper.trials=2")
    assert status == 0, error
    assert states(tmp_path / "search") == []


def test_a_failed_trial_does_not_stop_the_others(run, tmp_path):
    status, printed, error = run("optimizer.lr=-1,-2", "hydra.sweeper.trials=2")
    assert status == 1
    assert "Invalid learning rate: -" in error
    assert states(tmp_path / "search") == ["FAIL", "FAIL"]
    assert "0 of 2 jobs done" in printed


class Fault(Callback):
    """Fails in the second epoch while a file exists."""

    def __init__(self, file: str, kind: str) -> None:
        self.file, self.kind = Path(file), kind

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1 and self.file.exists():
            kinds = {"memory": torch.OutOfMemoryError(), "killed": MachineFault("Rank 1")}
            raise kinds.get(self.kind) or OSError(getattr(errno, self.kind), "it is full", "some file")


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "memory", "killed"])
def test_a_fault_of_the_machine_is_not_the_result_of_a_trial(run, tmp_path, kind):
    file = tmp_path / "fault"
    file.touch()
    arguments = [f"+callbacks.fault={{_target_: test_search.Fault, file: {file}, kind: {kind}}}", RATE]
    number = 2 if kind == "ENOSPC" else 1
    status, printed, error = run(*arguments, f"hydra.sweeper.trials={number}")
    assert status == 1
    assert error.count("Job 0 failed: ") == 1  # it is not repeated at once, and does not prevent other trials
    assert states(tmp_path / "search") == ["RUNNING"] * number
    assert f"0 of {number} jobs done: " in printed
    assert "Run the missing jobs: " in printed
    before = [trial.params for trial in study(tmp_path / "search").trials]

    file.unlink()
    status, printed, error = run(*arguments, f"hydra.sweeper.trials={number}")
    assert status == 0, error
    assert states(tmp_path / "search") == ["COMPLETE"] * number
    assert [trial.params for trial in study(tmp_path / "search").trials] == before
    assert "Job 0 continues from" in printed
    assert f"{number} of {number} jobs done: " in printed


def test_a_trial_that_diverges_is_pruned(run, tmp_path):
    status, printed, error = run("optimizer.lr=1e17,1e18", "hydra.sweeper.trials=2")
    assert status == 0, error
    assert states(tmp_path / "search") == ["PRUNED", "PRUNED"]
    assert "0 of 2 jobs done, 2 pruned: " in printed
    assert "Training diverged" in (tmp_path / "search/0/pruned.txt").read_text()
    assert not (tmp_path / "search/0/metrics.json").exists()


def test_a_trial_without_validation_fails(run, tmp_path):
    status, _, error = run(RATE, "+trainer.limit_val_batches=0", "hydra.sweeper.trials=1")
    assert (status, "trainer.limit_val_batches" in error) == (1, True)
    assert states(tmp_path / "search") == ["FAIL"]


def test_a_trial_without_a_folder_ran_here(run, tmp_path):
    assert run(RATE, "hydra.sweeper.trials=1", "trainer.max_epochs=1")[0] == 0
    (tmp_path / "search/0").rename(tmp_path / "removed")
    status, printed, error = run(RATE, "hydra.sweeper.trials=1", "trainer.max_epochs=1")
    assert (status, "1 of 1 jobs done: " in printed) == (0, True), error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "The search space is empty"),
        ([RATE, "data.folds=5", "data.fold=range(5)"], "data.fold: a search would choose the easiest validation"),
        (["++data.split_seed=0,1"], "data.split_seed: a search would choose the easiest validation images"),
        ([RATE, "hydra/launcher=parallel"], "one trial at a time"),
        ([RATE, "data.val_fraction=0", "hydra.sweeper.trials=1"], "Sweeping optimizer.lr with data.val_fraction=0"),
        ([RATE, "hydra.sweeper.trials=0"], "hydra.sweeper.trials=0 is out of range"),
        ([RATE, "hydra.sweeper.trials=-1"], "hydra.sweeper.trials=-1 is out of range"),
        ([RATE, "hydra.sweeper.trials=1.5"], "hydra.sweeper.trials=1.5 is not valid: expected a whole number"),
        ([RATE, "hydra.sweeper.trials=true"], "hydra.sweeper.trials=True is not valid"),
        (["optimizer.lrr=interval(0,1)"], "optimizer.lrr: unknown setting. Did you mean optimizer.lr?"),
        (["optimizer=sgd,adamw", "optimizer.momentum=0,0.9"], "optimizer.momentum: unknown setting"),
        (["optimizer=sgd,none"], "optimizer=none does not exist"),
        (["optimizer.lr=choice()"], "empty choice"),
        ([RATE, "hydra.sweeper.sampler=tpe"], "hydra.sweeper.sampler=tpe is not valid: expected optuna.samplers"),
        ([RATE, "hydra.sweeper.pruner=5"], "hydra.sweeper.pruner=5 is not valid: expected optuna.pruners"),
        (
            [RATE, "hydra.sweeper.pruner._target_=optuna.samplers.RandomSampler"],
            "hydra.sweeper.pruner=RandomSampler",
        ),
        ([RATE, "+hydra.sweeper.pruner._partial_=true"], "hydra.sweeper.pruner="),
        (
            [RATE, "hydra.sweeper.sampler={_target_: torch.nn.Identity}"],
            "hydra.sweeper.sampler=Identity()",
        ),
        ([RATE, "+hydra.sweeper.sampler.n_startup_trials=a"], "hydra.sweeper.sampler: '<' not supported"),
        ([RATE, "+hydra.sweeper.pruner.min_resource=[1]"], "hydra.sweeper.pruner.min_resource=[1]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused(run, arguments, named):
    status, _, error = run(*arguments)
    assert status == 1
    assert named in error
    assert error.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in error


def test_a_trial_of_a_running_process_is_not_drawn_again(run, tmp_path):
    """It is continued once that process has ended, even if it was killed."""
    assert run(RATE, "hydra.sweeper.trials=1")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        killed = SimpleNamespace(launch=lambda *_, **__: signal.raise_signal(signal.SIGINT))
        patch.setattr(study_module.Search, "_launcher", lambda *_: killed)
        assert run(RATE, "hydra.sweeper.trials=2")[0] == 130
    assert states(tmp_path / "search") == ["COMPLETE", "RUNNING"]
    hold = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print(1, flush=True); input()", str(tmp_path / "search/1.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "1\n"
    status, printed, error = run(RATE, "hydra.sweeper.trials=3")
    assert status == 0, error
    assert "Trial 3 of 3" in printed
    assert states(tmp_path / "search") == ["COMPLETE", "RUNNING", "COMPLETE"]
    assert "2 of 3 jobs done, 1 running: " in printed
    assert "Run the missing jobs" not in printed
    *_, last = csv.DictReader((tmp_path / "search/sweep.csv").open())
    assert (last["status"], last["folder"]) == ("running", "1")
    other.kill()
    other.communicate()
    status, printed, error = run(RATE, "hydra.sweeper.trials=3")
    assert status == 0, error
    assert "Trial 2 was interrupted and will be continued" in printed
    assert states(tmp_path / "search") == ["COMPLETE"] * 3


def test_the_printed_command_resumes_the_search(command, tmp_path):
    arguments = [*TINY[:-1], RATE, "hydra.sweeper.trials=1", signal_at(1, 2, signal.SIGINT)]
    status, printed, error = command(*arguments, main=search.main)
    assert status == 130
    assert "0 of 1 jobs done" in printed
    again = shlex.split(error.rpartition("python -m cifarnet.train ")[2])
    status, printed, error = command(*again, ALLOW_SIGNAL)
    assert status == 0, error
    assert "Trial 1 was interrupted and will be continued" in printed
    assert "1 of 1 jobs done" in printed


def test_each_search_has_its_own_folder(command, tmp_path):
    lean = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks=lean", "~logger", "hydra.sweeper.trials=1"]
    for more in ([], ["seed=1"], ["hydra.sweeper.study_name=mine"]):
        status, printed, error = command(*lean, RATE, *more, main=search.main)
        assert status == 0, error
        assert "1 of 1 jobs done" in printed
    names = sorted(path.name for path in (tmp_path / "lightning_logs/train").iterdir())
    assert (len(names), names[0]) == (3, "mine")
    status, printed, error = command(RATE, *lean, main=search.main)  # the same search
    assert (status, "Trial" in printed) == (0, False)
    status, printed, error = command(*lean, RATE, "seed=2", "hydra.sweeper.study_name=mine", main=search.main)
    assert (status, printed) == (1, "")  # no table of the other study
    assert "was created with other settings: seed=2" in error


def test_a_study_does_not_mix_trials_that_start_from_different_runs(run):
    same = [RATE, "hydra.sweeper.trials=1", "start.checkpoint=one"]
    status, _, error = run(*same)
    assert (status, "one: no checkpoint found" in error) == (1, True)
    status, _, error = run(*same, "start.checkpoint=two")
    assert status == 1
    assert "other settings: start.checkpoint=one, start.checkpoint=two" in error


@pytest.mark.parametrize("torn", [b'{"op_code":5,"worker', b"\0" * 100, b"{"])
def test_an_unfinished_last_line_of_a_journal_is_removed(run, tmp_path, torn):
    lean = ["callbacks.progress=null", "trainer.max_epochs=1", RATE]
    assert run(*lean, "hydra.sweeper.trials=1")[0] == 0
    with (tmp_path / "search/study.journal").open("ab") as file:
        file.write(torn)
    (tmp_path / "search/study.journal.lock").touch()  # as Optuna's own lock leaves it
    start = time.monotonic()
    status, _, error = run(*lean, "hydra.sweeper.trials=2")
    assert status == 0, error
    assert time.monotonic() - start < 25
    assert states(tmp_path / "search") == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    "content", [b"hello\nworld\n", b"[1]\n", b"{}\n", b'{"op_code": 99, "worker_id": "x"}\n', b"\xff\xfe\n"]
)
def test_an_unreadable_journal_is_reported_in_one_message(run, tmp_path, content):
    (tmp_path / "search").mkdir()
    (tmp_path / "search/study.journal").write_bytes(content)
    status, printed, error = run(RATE)
    assert (status, printed) == (1, "")
    assert error.startswith("Error: search/study.journal cannot be read: ")


@pytest.mark.parametrize("name", ["study.journal", "study.lock", "0.lock", "sweep.csv", "stop", "0"])
def test_a_link_out_of_the_folder_is_refused(run, tmp_path, name):
    (tmp_path / "search").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "search" / name).symlink_to(tmp_path / "mine")
    status, _, error = run(RATE)
    assert (status, f"search/{name} is a link" in error) == (1, True)
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "search"]


def test_a_folder_that_was_renamed_keeps_its_study(run, tmp_path):
    lean = ["callbacks.progress=null", "trainer.max_epochs=1", RATE]
    assert run(*lean, "hydra.sweeper.trials=1")[0] == 0
    (tmp_path / "search").rename(tmp_path / "renamed")
    status, printed, error = run(*lean, "hydra.sweeper.trials=2", "hydra.sweep.dir=renamed")
    assert status == 0, error
    assert "Trial 2 of 2" in printed
    assert "Trial 1 of 2" not in printed


def test_processes_of_a_search_draw_different_trials_and_claim_different_gpus(tmp_path):
    """The processes start at the same time; each prints the GPU that it sees."""
    program = (
        "import os, sys; from cifarnet.sweeps.search import Search\n"
        "def launcher(self, task):\n"
        "    print('GPU', os.environ['CUDA_VISIBLE_DEVICES'], flush=True); input(); sys.exit(0)\n"
        "Search._launcher = launcher\n"
        "from cifarnet.search import main; main()"
    )
    arguments = [setting for setting in TINY if setting != "trainer=cpu"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments, RATE],
            cwd=tmp_path,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "3,5", "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    gpus = {next(line for line in process.stdout if line.startswith("GPU")) for process in processes}
    for process in processes:
        process.communicate("\n")
    assert gpus == {"GPU 3\n", "GPU 5\n"}
    rates = [trial.params["optimizer.lr"] for trial in study(tmp_path / "search").trials]
    assert len(set(rates)) == 2


def test_combinations_of_recipes_are_searched(run, tmp_path):
    status, _, error = run(
        "callbacks.progress=null", "trainer.max_epochs=1", "+search=recipe", "hydra.sweeper.trials=4"
    )
    assert status == 0, error
    tried = [trial.params for trial in study(tmp_path / "search").trials]
    assert len({settings["+recipe"] for settings in tried}) > 1
    table = {row["folder"]: row for row in csv.DictReader((tmp_path / "search/sweep.csv").open())}
    for job, settings in enumerate(tried):
        config = json.loads((tmp_path / f"search/{job}/metrics.json").read_text())["config"]
        parts = [config["data"]["mix"] or {}, *(config["data"]["transforms"] or {}).values()]
        named = {part["_target_"].rpartition(".")[2].lower() for part in parts if part}
        assert {*settings["+recipe"].strip("[]").split(",")} - {""} == named
        assert table[str(job)]["+recipe"] == settings["+recipe"]
        assert config["objective"]["label_smoothing"] == settings["objective.label_smoothing"]
        assert [config["data"][key] for key in ("cutout", "crop_padding")] == [
            int(settings[f"data.{key}"]) for key in ("cutout", "crop_padding")
        ]
