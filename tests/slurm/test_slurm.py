"""Sweeps and searches with a real SLURM, as root: python -m pytest -m slurm tests/slurm -s"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import cifarnet
from campaign.test_kills import assert_same_run
from conftest import SMALL
from slurm import daemons

pytestmark = pytest.mark.slurm
PLACES = [str(Path(__file__).parents[1]), str(Path(cifarnet.__file__).parents[1])]
LEAN = ["callbacks.pictures=null", "~logger"]
SLOW = "+callbacks.slow={_target_: slurm.slow.Slow, seconds: %s}"
LONG = [*SMALL, *LEAN, "trainer.max_epochs=40", "model.drop_rate=0.2", "optimizer.lr=0.02", SLOW % 0.1]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """Start SLURM; the folder has its logs."""
    if (why := daemons.obstacle()) is not None:
        pytest.skip(f"no SLURM here: {why}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with daemons.running(folder):
            yield folder
    except TimeoutError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The jobs of LONG with four seeds, run without SLURM and not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    status, printed = finish(
        start(folder, "cifarnet.train", "-m", *LONG, SLOW % 0, "seed=range(4)", "hydra.sweep.dir=a")
    )
    assert status == 0, printed
    return folder / "a"


def start(folder: Path, module: str, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PLACES), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", module, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=folder, env=environment, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=600)
    print(printed)
    return process.returncode, printed


def until(what: Callable[[], object], seconds: int = 300) -> None:
    for _ in range(2 * seconds):
        if what():
            return
        time.sleep(0.5)
    raise TimeoutError


def name(folder: Path, job: int) -> str:
    """SLURM's name for a job."""
    return json.loads((folder / "slurm.json").read_text())[str(job)]


def squeue(job: str, what: str) -> str:
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", f"--format={what}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def kill(job: str) -> None:
    """Kill the process that trains."""
    number = squeue(job, "%A")
    for process in psutil.process_iter(["environ", "cmdline"]):
        environment = process.info["environ"] or {}
        words = process.info["cmdline"] or [""]
        ours = (
            environment.get("SLURM_CONF") == os.environ["SLURM_CONF"]
        )  # not a job with that number of another cluster
        if ours and environment.get("SLURM_JOB_ID") == number and words[0] == sys.executable:
            print(f"kill -9 {process.pid}: {job}")
            process.kill()


def release(job: str) -> bool:
    """Start a job at once that waits after a requeue."""
    if squeue(job, "%T") == "PENDING":
        subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=False)
        return True
    return False


def logged(cluster: Path, pattern: str) -> list[str]:
    """The matching lines in SLURM's logs."""
    files = [cluster / f"{daemon}.log" for daemon in ("slurmctld", "slurmd")]
    lines = [line for file in files for line in file.read_text().splitlines() if re.search(pattern, line)]
    print("\n".join(lines))
    return lines


def sessions(run: Path) -> int:
    return len(json.loads((run / "metrics.json").read_text())["sessions"])


def test_a_preempted_job_and_a_killed_job(cluster, whole, tmp_path):
    sweep = tmp_path / "sweep"
    process = start(tmp_path, "cifarnet.train", "-m", *LONG, *SLURM, "seed=range(4)", "hydra.sweep.dir=sweep")
    until(lambda: all((sweep / job / "checkpoints/last.ckpt").exists() for job in "02"))
    preempted = name(sweep, 0)
    subprocess.run(["scontrol", "requeue", preempted], check=True)
    kill(name(sweep, 2))
    until(lambda: release(preempted))
    status, printed = finish(process)
    assert status == 1
    assert "Job 2: ended by SLURM (state FAILED). See sweep/.submitit/" in printed
    assert "3 of 4 jobs done" in printed
    assert "Not finished: 2\n" in printed
    assert "Error: Job 2 ended before it was finished." in printed
    assert logged(cluster, rf"[Rr]equeue.*{preempted}|JobId={preempted}.*[Rr]equeue|DUE TO JOB REQUEUE")
    for job in "013":
        assert_same_run(whole / job, sweep / job)
    assert [sessions(sweep / job) for job in "013"] == [2, 1, 1]

    allowed = "classes=[slurm.slow.Slow]"
    status, printed = finish(
        start(tmp_path, "cifarnet.train", "sweep.resume=sweep", allowed, "hydra.launcher.timeout_min=30")
    )
    assert status == 0
    assert printed.count("is done") == 3
    assert "4 of 4 jobs done" in printed
    assert_same_run(whole / "2", sweep / "2")
    assert sessions(sweep / "2") == 2


def test_a_job_continues_after_its_time_limit(cluster, whole, tmp_path):
    times = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30", SLOW % 0.7]
    process = start(tmp_path, "cifarnet.train", "-m", *LONG, *SLURM, *times, "hydra.sweep.dir=sweep")
    until(lambda: (tmp_path / "sweep/slurm.json").exists())
    job = name(tmp_path / "sweep", 0)
    until(lambda: squeue(job, "%T") == "RUNNING")
    until(lambda: squeue(job, "%T") == "PENDING")
    while process.poll() is None:
        release(job)
        time.sleep(1)
    status, printed = finish(process)
    assert status == 0
    assert "1 of 1 jobs done" in printed
    assert "Stopped by SIGUSR2 after " in "".join(
        file.read_text() for file in (tmp_path / "sweep/.submitit").glob("*/*.err")
    )
    assert logged(cluster, rf"warning signal 12 to JobId={job}|JobId={job}.*requeue|requeue.*JobId={job}")
    assert_same_run(whole / "0", tmp_path / "sweep/0")
    assert sessions(tmp_path / "sweep/0") >= 2


def test_jobs_continue_when_the_sweep_is_interrupted_and_use_their_cores(cluster, tmp_path):
    few = [*SMALL, *LEAN, "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=2", "hydra.sweep.dir=sweep"]
    process = start(tmp_path, "cifarnet.train", "-m", *few, "seed=0,1")
    until(lambda: (tmp_path / "sweep/slurm.json").exists())
    process.send_signal(signal.SIGINT)
    status, printed = finish(process)
    assert status == 130
    array = name(tmp_path / "sweep", 0).partition("_")[0]
    assert f"scancel {array}." in printed
    status, printed = finish(start(tmp_path, "cifarnet.train", "sweep.resume=sweep"))
    assert status == 0
    assert f"Already in SLURM's queue: {array}_0, {array}_1" in printed
    assert "2 of 2 jobs done" in printed
    for job in "01":
        assert json.loads((tmp_path / "sweep" / job / "metrics.json").read_text())["hardware"]["threads"] == 2


def test_a_process_of_a_search_continues_the_trial_of_a_killed_one(cluster, tmp_path):
    search = [*LONG, "trainer.max_epochs=20", "seed=0,1,2,3", "hydra.sweeper.trials=4", "hydra.sweeper.pruner=null"]
    search += [*SLURM, "hydra.launcher.array_parallelism=2", "hydra.sweep.dir=search"]
    process = start(tmp_path, "cifarnet.search", *search)
    until(lambda: len(list((tmp_path / "search").glob("*/checkpoints/last.ckpt"))) == 2)
    kill(name(tmp_path / "search", 1))
    status, printed = finish(process)
    assert status == 0
    assert "4 of 4 jobs done" in printed
    printed = "".join(file.read_text() for file in (tmp_path / "search/.submitit").glob("*/*.out"))
    assert "was interrupted and will be continued" in printed


def test_two_tasks_train_one_network(cluster, tmp_path):
    two = ["hydra.launcher.tasks_per_node=2", "hydra.sweep.dir=sweep", "callbacks.slow.seconds=0.1,0.11"]
    process = start(tmp_path, "cifarnet.train", "-m", *LONG, *SLURM, *two)
    until(lambda: (tmp_path / "sweep/0/checkpoints/last.ckpt").exists())
    job = name(tmp_path / "sweep", 0)
    subprocess.run(["scontrol", "requeue", job], check=True)
    until(lambda: release(job))
    status, printed = finish(process)
    assert status == 0
    assert "2 of 2 jobs done" in printed
    for number in "01":
        assert json.loads((tmp_path / "sweep" / number / "metrics.json").read_text())["hardware"]["ranks"] == 2
    assert_same_run(tmp_path / "sweep/1", tmp_path / "sweep/0")
    assert sessions(tmp_path / "sweep/0") == 2
    logged(cluster, r"launch task StepId=\S+ request|DUE TO JOB REQUEUE")
