import csv
import logging
import math
import re
from pathlib import Path

import pytest
from filelock import FileLock
from lightning.pytorch.callbacks import Callback

from cifarnet.records import tables
from cifarnet.sweeps import summary
from conftest import SMALL
from example_record import write_record


def make_job(folder: Path, name: str | int, overrides: list[str], score: float | None = None, error: str = "") -> Path:
    job = folder / str(name)
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra/overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    (job / "checkpoints").mkdir()
    (job / "checkpoints/best.ckpt").write_text("")
    if score is not None:
        seed = next((int(override[5:]) for override in overrides if override.startswith("seed=")), 0)
        write_record(job, val_accuracy=score, test_accuracy=score - 0.01, seconds=2.0, seed=seed)
    if error:
        (job / "error.txt").write_text(error + "\n")
    return job


@pytest.fixture
def folder(tmp_path):
    """A sweep of two learning rates with two seeds each, and a job that failed."""
    for number, (rate, seed, score) in enumerate([(0.1, 0, 0.8), (0.1, 1, 0.9), (0.2, 0, 0.6), (0.2, 1, 0.7)]):
        make_job(tmp_path, number, [f"optimizer.lr={rate}", f"seed={seed}", "name=x"], score)
    make_job(tmp_path, 4, ["optimizer.lr=0.3", "seed=0", "name=x"], error="it exploded")
    return tmp_path


def test_jobs_that_differ_only_by_seed_are_one_row(folder):
    first, second, failed = tables.grouped(tables.read_sweep(folder), "val_accuracy")
    assert first.settings == {"optimizer.lr": "0.1", "name": "x"}
    assert (first.mean, len(first.values)) == (pytest.approx(0.85), 2)
    assert first.deviation == pytest.approx(math.sqrt(0.005))
    assert second.mean == pytest.approx(0.65)
    assert (failed.values, failed.runs[0].status) == ([], "failed")
    lines = summary.table([first, second, failed]).splitlines()
    assert lines[0].split() == ["val", "accuracy", "test", "accuracy", "seconds", "n", "optimizer.lr", "job"]
    assert " ".join(lines[1].split()) == "85.00 ± 7.07% 84.00 ± 7.07% 2.00 ± 0.00 2 0.1 0,1"
    assert lines[3].split() == ["failed", "0", "0.3", "4"]


def test_folds_are_paired(tmp_path, capsys):
    for number in range(10):
        rate, fold = (0.1, 0.2)[number // 5], number % 5
        score = [0.5, 0.9, 0.3, 0.7, 0.6][fold] + [0.02, 0.01, 0.03, 0.00, 0.02][fold] * (rate == 0.1)
        job = make_job(tmp_path, number, ["data.folds=5", f"data.fold={fold}", f"optimizer.lr={rate}"], score)
        data = {"folds": 5, "fold": fold, "split_seed": 0}
        write_record(job, **{"val_accuracy": score, "resolved.data": data})
    summary.summarize(tmp_path, 10, "resume")
    printed = capsys.readouterr().out
    assert re.search(r"a +61\.6\d* .* 5 +0\.1 +0,1,2,3,4\n +b +60\.0\d* .* 5 +0\.2 +5,6,7,8,9\n", printed)
    assert re.search(r"a - b: \+1\.6\d* points, .* paired over 5 folds, p = 0\.1: not statistically", printed)
    assert "Nadeau" in printed


def test_a_search_and_a_single_fold_have_no_comparison(tmp_path, capsys):
    for name, folds, trials in [("search", range(3), {}), ("single", [1], None)]:
        for number, (rate, fold) in enumerate((rate, fold) for rate in (0.1, 0.2) for fold in folds):
            overrides = ["data.folds=3", f"data.fold={fold}", f"optimizer.lr={rate}"]
            job, score = make_job(tmp_path / name, number, overrides), rate + fold / 10
            data = {"folds": 3, "fold": fold, "split_seed": 0}
            write_record(job, **{"val_accuracy": score, "resolved.data": data})
        summary.summarize(tmp_path / name, 6, "resume", trials)
        printed = capsys.readouterr().out
        assert "jobs done" in printed
        assert " - " not in printed


def test_control_characters_are_escaped_and_links_are_not_followed(folder, tmp_path, capsys):
    (folder / "4/error.txt").write_text("a\x1b[2Jb")
    make_job(folder, 5, ['"optimizer.lr=\\e]0;x"'], 0.5)
    for name in ("sweep.tmp", "sweep.csv"):
        (folder / name).symlink_to(tmp_path / "mine")
    summary.summarize(folder, 5, "sweep.resume=x")
    printed = capsys.readouterr().out
    assert "a\\x1b[2Jb" in printed
    assert "\\x1b]0;x" in printed
    assert "\x1b" not in printed
    assert not (tmp_path / "mine").exists()


def test_jobs_may_have_names(tmp_path, capsys):
    for seed in (9, 10, 2):
        make_job(tmp_path, f"seed_{seed}", [f"seed={seed}", "name=x"], seed / 100)
    assert [run.folder.name for run in tables.read_sweep(tmp_path)] == ["seed_2", "seed_9", "seed_10"]
    summary.summarize(tmp_path, 3, "sweep.resume=x")
    assert "3 of 3 jobs done" in capsys.readouterr().out


def test_summary_is_written_although_a_job_failed(folder, capsys):
    summary.summarize(folder, 5, "sweep.resume=x")
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert list(rows[0]) == [
        *("val_accuracy", "test_accuracy", "optimizer.lr", "seed", "seconds", "status", "folder", "note")
    ]
    assert [row["val_accuracy"] for row in rows] == ["0.9", "0.8", "0.7", "0.6", ""]
    assert (rows[0]["optimizer.lr"], rows[0]["seed"]) == ("0.1", "1")
    assert (rows[-1]["status"], rows[-1]["note"]) == ("failed", "it exploded")
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.tmp"))
    printed = capsys.readouterr().out
    assert "job 4 failed: it exploded" in printed
    assert "4 of 5 jobs done" in printed
    assert "Not finished" not in printed
    assert "sweep.resume=" in printed


def test_unfinished_jobs_are_listed(folder, capsys):
    for number in (1, 3):
        (folder / str(number) / "metrics.json").unlink()
    summary.summarize(folder, 9, "sweep.resume=x")
    assert "Not finished: 1, 3, 5, 6, 7, 8\n" in capsys.readouterr().out


def test_a_job_that_another_process_runs_is_running(folder, capsys):
    for number in (1, 3):
        (folder / str(number) / "metrics.json").unlink()
        (folder / str(number) / ".lock").touch()
    with FileLock(folder / "3/.lock"):
        summary.summarize(folder, 5, "sweep.resume=x")
    printed = capsys.readouterr().out
    assert "2 of 5 jobs done, 1 failed, 1 running: " in printed
    assert "Not finished: 1\n" in printed
    statuses = {row["folder"]: row["status"] for row in csv.DictReader((folder / "sweep.csv").open())}
    assert (statuses["1"], statuses["3"]) == ("cut off", "running")


def test_a_sweep_without_a_result_has_no_figure(tmp_path):
    for number in range(2):
        make_job(tmp_path, number, [f"optimizer.lr={number}"], error="it exploded")
    summary.summarize(tmp_path, 2, "sweep.resume=x")
    assert (tmp_path / "sweep.csv").exists()
    assert not (tmp_path / "sweep.png").exists()


def test_pruned_jobs_are_not_missing(tmp_path, capsys):
    make_job(tmp_path, 0, ["optimizer.lr=0.1"], 0.8)
    (make_job(tmp_path, 1, ["optimizer.lr=0.2"]) / "pruned.txt").write_text("after epoch 1 of 2\n")
    summary.summarize(tmp_path, 0, "sweep.resume=x")
    printed = capsys.readouterr().out
    assert "1 of 2 jobs done, 1 pruned" in printed
    assert "sweep.resume=" not in printed
    assert "pruned,1,after epoch 1 of 2" in (tmp_path / "sweep.csv").read_text()


def test_a_folder_without_jobs_has_no_summary(tmp_path, capsys):
    summary.summarize(tmp_path, 0, "sweep.resume=x")
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_only_the_best_jobs_keep_their_checkpoints(folder):
    summary.clear_checkpoints(folder, keep=None)
    assert len(list(folder.glob("*/checkpoints"))) == 5
    summary.clear_checkpoints(folder, keep=2)
    assert sorted(path.parent.name for path in folder.glob("*/checkpoints")) == ["0", "1", "4"]


def test_notes_of_libraries_are_not_printed(command, tmp_path):
    """Matplotlib notes that texts on an axis could be read as dates; a module of the user logs a warning."""
    log = "+callbacks.log={_target_: test_summary.Log}"
    status, out, err = command("-m", *SMALL, "threads=1", log, "name=2024-01-01,2024-01-02", "hydra.sweep.dir=sweep")
    assert (status, "categorical" in out + err) == (0, False), out + err
    assert "[HYDRA] Launching 2 jobs locally" in out
    assert (tmp_path / "sweep/sweep.png").exists()
    log = (tmp_path / "sweep/0/train.log").read_text("utf-8")
    assert "Epoch 2/2" in log
    assert "a warning: ±" in log
    assert "a note of a user's module" in log
    assert "a note of a library" not in log


class Log(Callback):
    def on_fit_start(self, trainer, module):
        logging.getLogger("other").info("a note of a user's module")
        logging.getLogger("matplotlib.category").info("a note of a library")
        logging.getLogger("other").warning("a warning: ±")
