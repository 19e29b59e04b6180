import json
import shutil
import subprocess
import sys

import psutil
import pytest

from conftest import SMALL

TINY = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks.pictures=null", "~logger"]


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
        (["sweep.resume=nowhere"], "no sweep in that folder"),
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
    job = "from cifarnet.runs import parallel; parallel.end_with_parent(); print('ready', flush=True); "
    job += "import time; time.sleep(60)"
    start = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {job!r}]); print(p.pid, flush=True); "
    parent = subprocess.Popen([sys.executable, "-c", start + "p.wait()"], stdout=subprocess.PIPE, text=True)
    printed = {parent.stdout.readline().strip() for _ in range(2)}
    pid = int((printed - {"ready"}).pop())
    assert "ready" in printed
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not alive
