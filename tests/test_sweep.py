import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import SMALL

from cifarnet import report, sweep

TINY = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks.pictures=null", "~logger"]


def make_job(folder: Path, number: int, overrides: list[str], score: float | None = None, error: str = "") -> Path:
    job = folder / str(number)
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra/overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    (job / "checkpoints").mkdir()
    (job / "checkpoints/best.ckpt").write_text("")
    if score is not None:
        metrics = {"val_accuracy": score, "test_accuracy": score - 0.01, "seconds": 2.0}
        (job / "metrics.json").write_text(json.dumps(metrics))
    if error:
        (job / "error.txt").write_text(error + "\n")
    return job


@pytest.fixture
def folder(tmp_path):
    """Two rates with two seeds each, and a failed one."""
    for number, (rate, seed, score) in enumerate([(0.1, 0, 0.8), (0.1, 1, 0.9), (0.2, 0, 0.6), (0.2, 1, 0.7)]):
        make_job(tmp_path, number, [f"optimizer.lr={rate}", f"seed={seed}", "name=x"], score)
    make_job(tmp_path, 4, ["optimizer.lr=0.3", "seed=0", "name=x"], error="it exploded")
    return tmp_path


def test_jobs_that_differ_only_by_seed_are_one_row(folder):
    first, second, failed = sweep.grouped(sweep.read_all(folder))
    assert first.settings == {"optimizer.lr": "0.1", "name": "x"}
    assert (first.mean, len(first.scores)) == (pytest.approx(0.85), 2)
    assert first.deviation == pytest.approx(math.sqrt(0.005))
    assert second.mean == pytest.approx(0.65)
    assert (failed.scores, failed.jobs[0].status) == ([], "failed")
    lines = sweep.table([first, second, failed]).splitlines()
    assert lines[0].split() == ["val", "accuracy", "n", "optimizer.lr", "seconds", "job"]
    assert lines[1].split() == ["85.00%", "±", "7.07", "2", "0.1", "2.0", "0,1"]
    assert lines[3].split() == ["failed", "0", "0.3", "4"]


def test_summary_is_written_although_a_job_failed(folder, capsys):
    sweep.summarize(folder)
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["val_accuracy"] for row in rows] == ["0.9", "0.8", "0.7", "0.6", ""]
    assert (rows[0]["optimizer.lr"], rows[0]["seed"]) == ("0.1", "1")
    assert (rows[-1]["status"], rows[-1]["note"]) == ("failed", "it exploded")
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "job 4 failed: it exploded" in printed
    assert "4 of 5 jobs done" in printed
    assert "sweep.resume=" in printed


def test_only_the_best_jobs_keep_their_checkpoints(folder):
    sweep.clear_checkpoints(folder, keep=None)
    assert len(list(folder.glob("*/checkpoints"))) == 5
    sweep.clear_checkpoints(folder, keep=2)
    assert sorted(path.parent.name for path in folder.glob("*/checkpoints")) == ["0", "1", "4"]


@pytest.mark.parametrize("keys", [["a"], ["model"], ["a", "model"], ["a", "model", "b"]])
def test_pictures_of_one_two_and_three_settings(keys, tmp_path):
    values = {"a": ["0.001", "0.1", "1"], "model": ["cnn", "mine"], "b": ["1", "2"]}
    results = [({}, 0.5, math.nan)]
    for key in keys:
        results = [
            ({**s, key: value}, score + 0.1 * i, 0.01) for s, score, _ in results for i, value in enumerate(values[key])
        ]
    results.append(({key: values[key][0] for key in keys}, math.nan, math.nan))
    report.sweep(results, keys).savefig(tmp_path / "sweep.png")


def test_importance_is_the_share_of_variance_that_a_setting_explains():
    import numpy as np

    results = [({"a": a, "b": b}, 0.5 + 0.1 * int(a), 0.0) for a in "01" for b in "01"]
    scores = np.array([score for _, score, _ in results])
    assert report._importance(results, scores, "a") == pytest.approx(1)
    assert report._importance(results, scores, "b") == pytest.approx(0)


def test_a_failed_job_stops_no_other_and_is_told(command, tmp_path):
    status, printed, error = command("-m", *TINY, "optimizer.lr=0.01,-1,0.02", "hydra.sweep.dir=sweep")
    assert status == 1
    assert "Invalid learning rate: -1" in error
    assert "2 of 3 jobs done" in printed
    assert "Invalid learning rate: -1" in (tmp_path / "sweep/1/error.txt").read_text()
    assert [(tmp_path / f"sweep/{job}/metrics.json").is_file() for job in "012"] == [True, False, True]


def test_resuming_runs_only_what_is_missing(command, tmp_path):
    status, _, error = command("-m", *TINY, "optimizer.lr=0.01,0.02,0.03", "hydra.sweep.dir=sweep")
    assert status == 0, error
    finished = [json.loads((tmp_path / f"sweep/{job}/metrics.json").read_text())["finished"] for job in "012"]
    (tmp_path / "sweep/1/metrics.json").unlink()  # as if cut off after its last checkpoint
    shutil.rmtree(tmp_path / "sweep/2")  # as if never begun

    status, printed, error = command("sweep.resume=sweep")
    assert status == 0, error
    assert "Job 0 is done" in printed
    assert "Job 1 goes on from sweep/1/checkpoints/last.ckpt" in printed
    assert "3 of 3 jobs done" in printed
    again = [json.loads((tmp_path / f"sweep/{job}/metrics.json").read_text()) for job in "012"]
    assert again[0]["finished"] == finished[0]
    assert [metrics["config"]["optimizer"]["lr"] for metrics in again] == [0.01, 0.02, 0.03]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep.resume=nowhere"], "no multirun in that folder"),
        (
            ["-m", *TINY, "data.val_fraction=0", "optimizer.lr=0.1,0.2"],
            "Sweeping optimizer.lr with data.val_fraction=0",
        ),
    ],
    ids=["resume", "blind"],
)
def test_what_cannot_work_is_refused(command, arguments, named):
    status, _, error = command(*arguments)
    assert status == 1
    assert named in error


def test_seeds_of_a_recipe_without_validation_may_be_swept(command):
    status, printed, error = command("-m", *TINY, "data.val_fraction=0", "seed=range(2)", "hydra.sweep.dir=sweep")
    assert status == 0, error
    assert "2 of 2 jobs done" in printed


def test_jobs_end_with_the_process_that_started_them():
    job = "from cifarnet import sweep; sweep.end_with_parent(); print('ready', flush=True); import time; time.sleep(60)"
    start = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {job!r}]); print(p.pid, flush=True); "
    parent = subprocess.Popen([sys.executable, "-c", start + "p.wait()"], stdout=subprocess.PIPE, text=True)
    printed = {parent.stdout.readline().strip() for _ in range(2)}
    pid = int((printed - {"ready"}).pop())
    assert "ready" in printed
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not alive
