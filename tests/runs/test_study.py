import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import Study, load_study

from cifarnet import search
from cifarnet.runs import space
from cifarnet.runs import study as study_module
from conftest import SMALL, signal_at

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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=1,2", CategoricalDistribution(["1", "2"])),
        ("optimizer=sgd,adamw", CategoricalDistribution(["sgd", "adamw"])),
        ("a=range(16,65,16)", IntDistribution(16, 64, step=16)),
        ("a=range(0.0,0.5,0.1)", FloatDistribution(0.0, 0.4, step=0.1)),
        ("a=interval(0,1)", FloatDistribution(0, 1)),
        ("a=tag(log,interval(0.001,0.1))", FloatDistribution(0.001, 0.1, log=True)),
        ("a=int(interval(2,8))", IntDistribution(2, 8)),
    ],
)
def test_sweeps_in_the_words_of_hydra(override, expected):
    assert space.distribution(OverridesParser.create().parse_override(override)) == expected


def test_search_and_its_continuation(run, command, tmp_path):
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

    status, printed, error = command("sweep.resume=search")  # as any other sweep
    assert status == 0, error
    assert "3 of 3 jobs done" in printed

    status, _, error = run(RATE, "seed=1")
    assert status == 1
    assert "is about other settings: without seed=1" in error


def test_the_seed_decides_what_is_tried(run, tmp_path):
    for folder in ("one", "same"):
        run(RATE, "hydra.sweeper.trials=2", f"hydra.sweep.dir={folder}", "trainer.max_epochs=1")
    one, same = ([trial.params for trial in study(tmp_path / folder).trials] for folder in ("one", "same"))
    assert one == same


def test_a_trial_that_was_cut_off_goes_on(run, tmp_path):
    stop = signal_at(1, 2, signal.SIGTERM)
    status, _, _ = run(RATE, stop, "hydra.sweeper.trials=1")
    assert status == 143
    assert states(tmp_path / "search") == ["RUNNING"]

    status, printed, error = run(RATE, stop, "hydra.sweeper.trials=1")  # that batch is past
    assert status == 0, error
    assert "Trial 1 was cut off: goes on" in printed
    assert "Job 0 goes on from search/0/checkpoints/last.ckpt" in printed
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


def test_a_failed_trial_stops_no_other_and_is_told(run, tmp_path):
    status, printed, error = run("optimizer.lr=-1,-2", "hydra.sweeper.trials=2")
    assert status == 1
    assert "Invalid learning rate: -" in error
    assert states(tmp_path / "search") == ["FAIL", "FAIL"]
    assert "0 of 2 jobs done" in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "Nothing to search"),
        ([RATE, "hydra/launcher=parallel"], "one trial at a time"),
        ([RATE, "data.val_fraction=0", "hydra.sweeper.trials=1"], "Sweeping optimizer.lr with data.val_fraction=0"),
    ],
    ids=["nothing", "parallel", "blind"],
)
def test_what_cannot_work_is_refused(run, arguments, named):
    status, _, error = run(*arguments)
    assert status == 1
    assert named in error


def test_a_trial_that_another_process_runs_is_left_to_it(run, tmp_path):
    """Until that process ends, however it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module.Search, "_launch", lambda *_: signal.raise_signal(signal.SIGINT))
        assert run(RATE, "hydra.sweeper.trials=1")[0] == 130
    assert states(tmp_path / "search") == ["RUNNING"]
    hold = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print(1, flush=True); input()", str(tmp_path / "search/0.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "1\n"
    status, printed, error = run(RATE, "hydra.sweeper.trials=2")
    assert status == 0, error
    assert "Trial 2 of 2" in printed
    assert states(tmp_path / "search") == ["RUNNING", "COMPLETE"]
    other.kill()
    other.communicate()
    status, printed, error = run(RATE, "hydra.sweeper.trials=2")
    assert status == 0, error
    assert "Trial 1 was cut off: goes on" in printed
    assert states(tmp_path / "search") == ["COMPLETE", "COMPLETE"]
