"""The SLURM launcher with fake SLURM programs; tests/slurm/ has tests with real ones."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from cifarnet import cli, search, train
from cifarnet.sweeps.multirun import resume_arguments
from cifarnet.sweeps.slurm import Task
from cifarnet.system import hardware
from conftest import SMALL

pytest.importorskip("submitit")
LEAN = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks.pictures=null", "~logger", "threads=1"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=2", "hydra.launcher.partition=main"]

# sbatch records the jobs of a script
SBATCH = """
import os, re, subprocess, sys
script = open(sys.argv[1]).read()
open("scripts.txt", "a").write(script)
array = re.search(r"--array=0-(\\d+)", script)
open("submitted.sh", "w").write(script)
jobs = [("7_%d" % i if array else "7") for i in range(int(array[1]) + 1 if array else 1)]
open("todo.txt", "w").write(" ".join(jobs))
print("Submitted batch job 7")
"""
# squeue runs the recorded jobs, if the file `runs` exists; then the queue is empty
SQUEUE = """
import os, subprocess, sys
if os.path.exists("state.txt"):
    print(open("state.txt").read())
elif os.path.exists("todo.txt"):
    jobs = open("todo.txt").read().split()
    os.remove("todo.txt")
    for job in jobs if os.path.exists("runs") else []:
        array = dict(zip(("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"), job.split("_"))) if "_" in job else {}
        subprocess.run(["bash", "submitted.sh"], env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"} | array)
"""
SRUN = """
import subprocess, sys
words = sys.argv[sys.argv.index("-u") - 1:]
sys.exit(subprocess.run(words, stdout=open("out.txt", "a"), stderr=open("err.txt", "a")).returncode)
"""
SCONTROL = "import sys; open('asked.txt', 'a').write(' '.join(sys.argv[1:]))"


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """The working directory of commands. If the file `runs` exists, submitted jobs run; squeue prints `state.txt`."""
    for name, program in {"sbatch": SBATCH, "squeue": SQUEUE, "srun": SRUN, "scontrol": SCONTROL}.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!{sys.executable}\n{program}")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setattr("cifarnet.sweeps.slurm.time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_jobs_that_slurm_ends_are_reported(command, cluster):
    more = ["hydra.launcher.setup=[echo ready]", "hydra.launcher.gpus_per_node=1"]
    status, printed, error = command("-m", *LEAN, *SLURM, *more, "seed=range(3)", "hydra.sweep.dir=sweep")
    assert status == 1
    script = (cluster / "scripts.txt").read_text()
    for line in ("array=0-2%3", "requeue", "signal=USR2@120", "partition=main", "cpus-per-task=2", "gpus-per-node=1"):
        assert f"\n#SBATCH --{line}\n" in script
    assert "\nexport SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\necho ready\n" in script
    assert "In SLURM's queue: 7_0 to 7_2." in printed
    assert "Job 1: ended by SLURM (state unknown). See sweep/.submitit/7_1" in printed
    assert error == "Error: Job 0 ended before it was finished.\n"


def test_jobs_run_and_a_resumed_sweep_waits_for_jobs_in_the_queue(command, cluster, monkeypatch):
    (cluster / "runs").touch()
    begin = ["-m", *LEAN, *SLURM, "optimizer.lr=0.01,0.02,-1", "trainer.max_epochs=2", "hydra.sweep.dir=sweep"]
    status, printed, error = command(*begin)
    assert status == 1
    assert "Job 2: failed: optimizer: Invalid learning rate: -1" in printed
    assert "2 of 3 jobs done, 1 failed" in printed
    assert error == "Error: optimizer: Invalid learning rate: -1. Change its settings.\n"
    whole = json.loads((cluster / "sweep/1/metrics.json").read_text())

    (cluster / "sweep/1/metrics.json").unlink()  # as if it had been stopped
    (cluster / "todo.txt").write_text("7_1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (cluster / "bin/sbatch").unlink()
    (cluster / "bin/squeue").write_text(
        (cluster / "bin/squeue").read_text().replace("    jobs =", '    print("7_1"); jobs =')
    )
    (cluster / "sweep/2").rename(cluster / "elsewhere")
    status, printed, error = command("sweep.resume=sweep")
    assert "Job 0 is done" in printed
    assert "Already in SLURM's queue: 7_1" in printed
    assert "continues from sweep/1/checkpoints/last.ckpt" in (cluster / "out.txt").read_text()
    assert json.loads((cluster / "sweep/1/metrics.json").read_text())["history"] == whole["history"]
    assert status == 1  # nothing takes job 2


def test_an_error_of_squeue_is_reported(command, cluster):
    (cluster / "bin/squeue").write_text(f"#!{sys.executable}\nimport sys; sys.exit('no controller')")
    status, _, error = command("-m", *LEAN, *SLURM, "seed=0,1", "hydra.sweep.dir=sweep")
    assert status == 1
    assert "hydra/launcher=slurm: SLURM does not respond: no controller" in error


@pytest.mark.parametrize(
    "setting",
    [
        'name="a\ntouch stolen"',
        'hydra.sweep.dir="a\ntouch stolen"',
        'hydra.launcher.partition="a\rb"',
        'hydra.launcher.setup=["echo", "a\ntouch stolen"]',
        '+hydra.launcher.additional_parameters.comment="a\ntouch stolen"',
        '+hydra.launcher.python="python\ntouch stolen"',
        '+hydra.launcher.srun_args=["a\x1b"]',
        '+hydra.launcher.comment="a\u2028b"',
    ],
)
@pytest.mark.parametrize("main", [train.main, search.main])
def test_control_characters_do_not_reach_sbatch(command, cluster, setting, main):
    multirun = ["-m"] if main is train.main else []
    status, _, error = command(*multirun, *LEAN, *SLURM, "seed=0,1", setting, main=main)
    assert status == 1
    assert "control character" in error
    assert error.count("\n") == 1
    assert not (cluster / "scripts.txt").exists()
    assert not (cluster / "lightning_logs").exists()


@pytest.mark.parametrize("launcher", ["submitit_slurm", "slurm"])
def test_control_characters_in_keys_and_the_working_directory_do_not_reach_sbatch(
    command, cluster, monkeypatch, launcher
):
    folder = cluster / "conf/hydra/launcher"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        f'defaults: [{launcher}]\nadditional_parameters: {{"comment\\ntouch stolen": 1, comment: "café $(ls)"}}'
    )
    status, _, error = command("-m", *LEAN, "--config-dir", "conf", "hydra/launcher=mine", "seed=0,1")
    assert (status, "control character" in error) == (1, True), error
    (cluster / "a\nb").mkdir()
    monkeypatch.chdir(cluster / "a\nb")
    status, _, error = command("-m", *LEAN, f"hydra/launcher={launcher}", f"hydra.sweep.dir='{Path.cwd()}/x'")
    assert (status, "control character" in error) == (1, True), error
    assert not (cluster / "scripts.txt").exists()


@pytest.mark.slow
def test_the_processes_of_a_search_run_as_jobs(command, cluster):
    pytest.importorskip("optuna")
    (cluster / "runs").touch()
    begin = [*LEAN, *SLURM, "seed=0,1,2", "hydra.sweeper.trials=2", "hydra.sweep.dir=search"]
    for submitted in (1, 0):  # the second time there is nothing left to do
        status, printed, error = command(*begin, "hydra.launcher.array_parallelism=1", main=search.main)
        assert status == 0, error
        assert "2 of 2 jobs done" in printed
        assert printed.count("In SLURM's queue") == submitted
    assert (cluster / "out.txt").read_text().count("Trial 2 of 2: ") == 1


def interrupted(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "state", "environment", "expected"),
    [
        (signal.SIGUSR2, "RUNNING", {}, "It is in SLURM's queue again."),
        (signal.SIGTERM, "RUNNING", {}, "It is in SLURM's queue again."),
        (signal.SIGTERM, "COMPLETING", {}, "SLURM is ending this job"),
        (signal.SIGUSR2, "RUNNING", {"SLURM_RESTART_COUNT": "3"}, "Restarted 3 times"),
        (signal.SIGUSR2, "RUNNING", {"SLURM_PROCID": "1"}, ""),
    ],
)
def test_a_job_that_receives_a_warning_signal_is_queued_again(
    cluster, monkeypatch, capsys, number, state, environment, expected
):
    job = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    for name, value in (job | {"SLURM_PROCID": "0"} | environment).items():
        monkeypatch.setenv(name, value)
    (cluster / "state.txt").write_text(state)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        Task(interrupted(number), train.train_run, max_restarts=3)()
    assert end.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert expected in capsys.readouterr().err
    asked = (cluster / "asked.txt").read_text() if (cluster / "asked.txt").exists() else ""
    assert asked == ("requeue 7_2" if "again." in expected else "")


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({}, None),
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "8"}, 3),
        ({"SLURM_CPUS_ON_NODE": "8"}, 8),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, 4),
    ],
)
def test_the_number_of_cores_is_that_of_the_slurm_job(monkeypatch, environment, cores):
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert hardware.slurm_cores() == cores
    assert hardware.slurm_tasks() == (2 if "SLURM_STEP_NUM_TASKS" in environment else 1)
    assert hardware.cores() == (cores or 16)


def test_a_sweep_can_be_resumed_with_another_launcher(tmp_path):
    hydra = ["hydra.mode=MULTIRUN", "hydra/launcher=slurm", "hydra.launcher.mem_gb=4", "hydra.launcher.partition=main"]
    overrides = {"hydra": {"overrides": {"hydra": hydra, "task": ["seed=0,1"]}, "sweeper": {}}}
    (tmp_path / "multirun.yaml").write_text(json.dumps(overrides))
    resume = f"sweep.resume={tmp_path}"
    kept = ["hydra.mode=MULTIRUN", "hydra/launcher=slurm", "hydra.launcher.partition=main", "seed=0,1"]
    assert resume_arguments([resume, "hydra.launcher.mem_gb=64"])[1:6] == [*kept, "hydra.launcher.mem_gb=64"]
    assert resume_arguments([resume, "hydra/launcher=basic"])[2:4] == ["seed=0,1", "hydra/launcher=basic"]


def test_a_launcher_for_a_single_run_is_refused(command):
    status, _, error = command(*LEAN, "hydra/launcher=slurm")
    assert (status, "hydra/launcher=slurm" in error, "Add -m" in error) == (1, True, True)


@pytest.mark.parametrize(
    ("launcher", "package"),
    [
        ("submitit_slurm", "submitit: pip install 'cifarnet[slurm]'"),
        ("submitit_local", "submitit: pip install 'cifarnet[slurm]'"),
        ("joblib", "joblib: pip install 'cifarnet[sweep]'"),
    ],
)
def test_the_package_of_a_missing_launcher_is_named(launcher, package):
    missing = MissingConfigException("", f"hydra/launcher/{launcher}", ["basic", "slurm"])
    assert cli.explain(missing) == f"This launcher needs {package}"


def test_a_missing_joblib_is_reported_before_a_folder_is_created(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    status, _, error = command("-m", *LEAN, "seed=0,1", "hydra/launcher=parallel")
    assert (status, error) == (1, "Error: This command needs joblib: pip install 'cifarnet[sweep]'\n")
    assert not (tmp_path / "lightning_logs").exists()
