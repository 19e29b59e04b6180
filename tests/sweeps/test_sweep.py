import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch
import yaml

from cifarnet.data import Synthetic
from cifarnet.errors import UserError
from cifarnet.sweeps.multirun import resume_arguments
from cifarnet.system import files
from conftest import ALLOW_SIGNAL, SMALL, assert_same_weights, signal_at, weights

TINY = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks.pictures=null", "~logger"]

LEAN = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks=lean", "~logger"]


def test_a_failed_job_does_not_stop_the_others(command, tmp_path):
    status, printed, error = command("-m", *TINY, "optimizer.lr=0.01,-1,0.02", "hydra.sweep.dir=sweep")
    assert status == 1
    assert "Invalid learning rate: -1" in error
    assert "2 of 3 jobs done" in printed
    assert "Invalid learning rate: -1" in (tmp_path / "sweep/1/error.txt").read_text()
    assert [(tmp_path / f"sweep/{job}/metrics.json").is_file() for job in "012"] == [True, False, True]


def test_resuming_runs_only_missing_jobs(command, tmp_path):
    status, _, error = command("-m", *TINY, "optimizer.lr=0.01,0.02,0.03", "hydra.sweep.dir=sweep")
    assert status == 0, error
    finished = [json.loads((tmp_path / f"sweep/{job}/metrics.json").read_text())["finished"] for job in "012"]
    (tmp_path / "sweep/1/metrics.json").unlink()  # as if it had been cut off after its last checkpoint
    shutil.rmtree(tmp_path / "sweep/2")  # as if it had not begun

    status, printed, error = command("sweep.resume=sweep")
    assert status == 0, error
    assert "Job 0 is done" in printed
    assert "Job 1 continues from sweep/1/checkpoints/last.ckpt" in printed
    assert "3 of 3 jobs done" in printed
    again = [json.loads((tmp_path / f"sweep/{job}/metrics.json").read_text()) for job in "012"]
    assert again[0]["finished"] == finished[0]
    assert [metrics["config"]["optimizer"]["lr"] for metrics in again] == [0.01, 0.02, 0.03]


def test_jobs_with_the_same_images_read_them_once(command, tmp_path, monkeypatch):
    read, reading = Synthetic.read, []
    monkeypatch.setattr(Synthetic, "read", lambda self: reading.append(self.train_size) or read(self))
    varied = ["data.crop_padding=0,2", "data.train_size=200,300", "seed=0,1"]
    fixed = [setting for setting in TINY if not setting.startswith("data.train_size")]
    assert command("-m", *fixed, *varied, f"hydra.sweep.dir={tmp_path / 'a'}")[0] == 0
    assert reading == [200, 300, 200, 300]
    for number, settings in [(1, ["seed=1"]), (7, ["data.train_size=300", "seed=1", "data.crop_padding=2"])]:
        words = ["data.train_size=200", "data.crop_padding=0", *settings]
        alone = tmp_path / f"alone{number}"
        command(*fixed, *words, f"hydra.run.dir={alone}")
        assert_same_weights(alone / "checkpoints/last.ckpt", tmp_path / f"a/{number}/checkpoints/last.ckpt")
        records = [json.loads((folder / "metrics.json").read_text()) for folder in (alone, tmp_path / f"a/{number}")]
        assert records[0]["data"] == records[1]["data"]
    del reading[:]
    assert command("-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'b'}")[0] == 0
    assert reading == [200]  # a new sweep, because files can have changed


def test_settings_are_checked_with_shared_images_too(command, tmp_path):
    swept = ["data.crop_padding=2,40", f"hydra.sweep.dir={tmp_path / 'a'}"]
    status, _, error = command("-m", *TINY, *swept)
    assert status == 1
    assert "Job 1 failed: data.crop_padding=40 " in error


def test_a_wrong_choice_is_reported_before_any_job_begins(command, tmp_path):
    status, _, error = command("-m", *SMALL, "seed=0,1", "scheduler=cosine,nope", f"hydra.sweep.dir={tmp_path / 'a'}")
    assert status == 1
    assert "nope" in error
    assert not (tmp_path / "a/0").exists()


def test_zipped_lists_give_the_jobs_of_a_loop_over_pairs(command, tmp_path):
    rates, seeds = ["0.01", "0.02", "0.05"], ["3", "4", "5"]
    lists = ["optimizer.lr=" + ",".join(rates), "seed=range(3,6)", "+hydra.sweeper.params={data.crop_padding: '0,1,2'}"]
    status, printed, error = command("-m", *TINY, *lists, "hydra.sweeper.zip=true", "hydra.sweep.dir=sweep")
    assert status == 0, error
    assert "3 of 3 jobs done" in printed
    for job, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        settings = [*TINY, f"data.crop_padding={job}"]
        settings += [f"optimizer.lr={rate}", f"seed={seed}"]
        assert command(*settings, f"hydra.run.dir=alone{job}")[0] == 0
        assert_same_weights(
            tmp_path / f"alone{job}/checkpoints/last.ckpt", tmp_path / f"sweep/{job}/checkpoints/last.ckpt"
        )

    before = weights(tmp_path / "sweep/1/checkpoints/last.ckpt")
    shutil.rmtree(tmp_path / "sweep/1")
    status, _, error = command("sweep.resume=sweep", "hydra.sweeper.zip=false")
    assert (status, "Remove hydra.sweeper.zip=false" in error) == (1, True)
    status, printed, error = command("sweep.resume=sweep")
    assert status == 0, error
    assert "3 of 3 jobs done" in printed
    after = weights(tmp_path / "sweep/1/checkpoints/last.ckpt")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep.resume=nowhere"], "multirun.yaml is missing"),
        (
            ["-m", *TINY, "data.val_fraction=0", "optimizer.lr=0.1,0.2"],
            "Sweeping optimizer.lr with data.val_fraction=0",
        ),
    ],
    ids=["resume", "blind"],
)
def test_wrong_settings_are_refused(command, arguments, named):
    status, _, error = command(*arguments)
    assert status == 1
    assert named in error


@pytest.mark.parametrize("folds", [["data.folds=4", "data.fold=range(4)"], ["data.folds=3,4", "data.fold=2"]])
def test_folds_are_swept_without_a_validation_fraction(command, tmp_path, folds):
    status, printed, error = command("-m", *TINY, "data.val_fraction=0", *folds, "hydra.sweep.dir=sweep")
    assert status == 0, error
    assert re.search(r"(\d) of \1 jobs done", printed)
    alone = ["data.val_fraction=0", "data.folds=4", "data.fold=2", "hydra.run.dir=alone"]
    assert command(*TINY, *alone)[0] == 0
    job = 2 if "range" in folds[1] else 1
    assert_same_weights(tmp_path / "alone/checkpoints/last.ckpt", tmp_path / f"sweep/{job}/checkpoints/last.ckpt")


def test_seeds_can_be_swept_without_validation(command):
    status, printed, error = command("-m", *TINY, "data.val_fraction=0", "seed=range(2)", "hydra.sweep.dir=sweep")
    assert status == 0, error
    assert "2 of 2 jobs done" in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["seed=range(0)"], "seed=range(0) has no values"),
        (["seed=range(5,1)"], "seed=range(5,1) has no values"),
        (["optimizer=glob(x*)"], "optimizer=glob(x*) has no values"),
        (["seed=range(0,3,0)"], "seed=range(0,3,0) has no values"),
        (["seed=range(1000000000)"], "has 1,000,000,000 values"),
        (["optimizer.lr=range(0.0,nan,0.1)"], "use finite numbers"),
        (["seed=range(999)", "split=range(999)"], "998,001 combinations"),
        (["optimizer.lr=interval(0,1)"], "Use cifarnet.search"),
        (["seed=0,1", "sweep.stop_at_failure=maybe"], "sweep.stop_at_failure=maybe is not valid"),
        (["seed=0,1", "sweep.keep_checkpoints=-1"], "sweep.keep_checkpoints=-1 is out of range"),
        (["seed=0,1", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0 is out of range"),
        (["seed=0,1", "optimizer.lr=1,2,3", "hydra.sweeper.zip=true"], "seed has 2, optimizer.lr has 3"),
        (["seed=0,1", "optimizer.lr=choice(1)", "hydra.sweeper.zip=true"], "seed has 2, optimizer.lr has 1"),
        (["seed=0,1", "hydra.sweeper.zip=maybe"], "hydra.sweeper.zip=maybe is not valid"),
        (["seed=0,1", "hydra.sweeper.dry_run=3"], "hydra.sweeper.dry_run=3 is not valid"),
        (["optimizer=sgd,none"], "optimizer=none does not exist"),
        (["seed=0,1", "hydra.sweep.subdir=${hydra:job.override_dirname}"], "Remove hydra.sweep.subdir"),
        (["seed=0,1", "hydra.sweep.subdir=same"], "Remove hydra.sweep.subdir"),
        (["seed=0,1", "hydra.output_subdir=null"], "Remove hydra.output_subdir"),
        (["seed=0,1", "output_dir=same"], "Remove output_dir"),
        (["output_dir=same,other"], "Remove output_dir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_sweeps_are_refused_before_a_folder_is_created(command, tmp_path, arguments, named):
    status, _, error = command("-m", *TINY, *arguments)
    assert status == 1
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "lightning_logs").exists()


def test_jobs_with_different_names_are_in_the_folder_of_their_sweep(command, tmp_path):
    status, printed, error = command("-m", *LEAN, "name=a,b", "hydra.sweep.dir='logs of ${name}'")
    assert status == 0, error
    assert "2 of 2 jobs done" in printed
    [folder] = tmp_path.glob("logs*")
    assert sorted(path.name for path in folder.glob("[0-9]")) == ["0", "1"]
    before = (folder / "0/metrics.json").read_bytes()
    status, printed, error = command(f"sweep.resume='{folder.name}'")
    assert status == 0, error
    assert [f"Job {number} is done" in printed for number in (0, 1)] == [True, True]

    status, _, error = command("-m", *LEAN, "seed=0,1", f"hydra.sweep.dir='{folder.name}'")
    assert (status, "contains another sweep" in error) == (1, True)
    assert (folder / "0/metrics.json").read_bytes() == before


FAILING = ["-m", *LEAN, "optimizer.lr=-1,0.01", "seed=range(2)", "data.val_fraction=0.1,0.2"]


def test_a_failed_job_can_stop_the_sweep(command, tmp_path):
    status, printed, error = command(*FAILING, "hydra.sweep.dir=sweep")
    assert status == 1
    assert "4 of 8 jobs done, 4 failed" in printed
    assert "cut off" not in printed
    assert "Job 0 failed: optimizer: Invalid learning rate: -1" in error
    assert error.count("Error") == 1
    status, printed, _ = command(*FAILING, "hydra.sweep.dir=stopped", "sweep.stop_at_failure=true")
    assert status == 1
    assert "0 of 8 jobs done, 1 failed" in printed
    assert not (tmp_path / "stopped/7").exists()
    status, printed, error = command("sweep.resume=stopped")  # runs the failed job again
    assert status == 1, error
    assert "0 of 8 jobs done, 1 failed" in printed


def test_parallel_jobs_print_their_names_and_failures(tmp_path):
    parallel = ["hydra/launcher=parallel", f"hydra.sweep.dir={tmp_path}/sweep", "threads=1"]
    program = [sys.executable, "-m", "cifarnet.train", *FAILING, *parallel]
    result = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert "4 of 8 jobs done, 4 failed" in result.stdout
    assert "[0] Job 0 failed: optimizer: Invalid learning rate: -1" in result.stderr
    assert result.stderr.count("Error") == 1
    assert sorted(re.findall(r"^\[(\d)\]   test accuracy ", result.stdout, re.MULTILINE)) == ["4", "5", "6", "7"]


def test_a_job_with_damaged_files_is_repeated(command, tmp_path):
    begin = ["-m", *TINY, "optimizer.lr=0.01,0.02,0.03,0.04", "hydra.sweep.dir=sweep"]
    assert command(*begin)[0] == 0
    whole = (tmp_path / "sweep/2/metrics.json").read_text()
    jobs = [tmp_path / "sweep" / name for name in "0123"]
    (jobs[0] / "metrics.json").write_text('{"val_accuracy"')
    (jobs[1] / ".hydra/overrides.yaml").write_bytes(b"{\xff")
    (jobs[2] / "metrics.json").unlink()
    (jobs[2] / "checkpoints/last.ckpt").write_bytes(b"PK\x03\x04")
    (jobs[3] / "metrics.json").unlink()
    (jobs[3] / "checkpoints/best.ckpt").write_bytes(b"")
    status, printed, error = command("sweep.resume=sweep")
    assert status == 0, error
    assert "4 of 4 jobs done" in printed
    assert "Job 0: sweep/0/metrics.json cannot be read" in printed.replace(f"{tmp_path}/", "")
    for job in "23":
        assert f"Job {job} is trained from the beginning: " in printed
        assert [path.name for path in (tmp_path / "sweep" / job).glob("damaged_*/*.ckpt")]
    again = json.loads((jobs[2] / "metrics.json").read_text())
    assert again["history"] == json.loads(whole)["history"]


def test_a_resumed_sweep_accepts_only_settings_that_do_not_affect_results(command, tmp_path):
    (tmp_path / "conf/optimizer").mkdir(parents=True)
    (tmp_path / "conf/optimizer/mine.yaml").write_text("{_target_: torch.optim.RMSprop, lr: 0.001}")
    config_dir = ["--config-dir", "conf"]
    logger = ["logger=csv", "logger.csv.name=first"]
    settings = [line for line in LEAN if line != "~logger"]
    begin = ["-m", *config_dir, *settings, *logger, "hydra.job.name=mine", "optimizer=mine", "seed=0,1"]
    assert command(*begin, "hydra.sweep.dir=sweep")[0] == 0
    shutil.rmtree(tmp_path / "sweep/1")
    changed = ["logger.csv.version=mine", "trainer.enable_progress_bar=false", "threads=1"]
    status, printed, error = command("sweep.resume=sweep", *config_dir, *changed)
    assert status == 0, error
    assert "Job 0 is done" in printed
    assert "2 of 2 jobs done" in printed
    assert (tmp_path / "sweep/1/first/mine").is_dir()
    assert (tmp_path / "sweep/1/mine.log").is_file()
    for refused in ("hydra.sweep.dir=other", "seed=3", "optimizer.lr=0.1", "name=other"):
        status, _, error = command("sweep.resume=sweep", refused)
        assert (status, "sweep.resume=sweep" in error, f"Remove {refused}" in error) == (1, True, True)


@pytest.mark.parametrize(
    "line",
    [
        "+callbacks.x={_target_: os.mkdir, path: exploded}",
        "+callbacks.x._target_=os.mkdir",
        "++callbacks.x._target_=torch.nn.Identity,os.mkdir",
        "+recipe.a.b=[{_target_: os.mkdir, path: exploded}]",
        "model=choice(cnn,{_target_: os.mkdir})",
        "+hydra.callbacks.x={_target_: os.mkdir, path: exploded}",
        "+hydra.sweeper.params.recipe='{_target_: os.mkdir, path: exploded}'",
    ],
)
def test_a_recorded_class_from_elsewhere_must_be_allowed(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    params = {"recipe": "{_target_: os.mkdir, path: exploded}"} if "params" in line else {}
    overrides = {"hydra": [line] if line.lstrip("+").startswith("hydra") else [], "task": ["seed=0,1", line]}
    (tmp_path / "multirun.yaml").write_text(
        yaml.dump({"hydra": {"overrides": overrides, "sweeper": {"params": params}}})
    )
    with pytest.raises(UserError, match=r"multirun.yaml names the class os.mkdir.*classes=\[os.mkdir\]"):
        resume_arguments(["sweep.resume=."])
    assert line in resume_arguments(["sweep.resume=.", "classes=[os.mkdir]"])


def test_a_link_out_of_the_folder_is_refused(command, tmp_path):
    (tmp_path / "sweep/0").mkdir(parents=True)
    (tmp_path / "sweep/multirun.yaml").touch()
    (tmp_path / "sweep/0/.hydra").symlink_to(tmp_path)
    status, _, error = command("sweep.resume=sweep")
    assert status == 1
    assert "sweep/0/.hydra is a link to a place outside sweep" in error


@pytest.mark.parametrize("content", ["", "a: {", "[1]", "hydra: 3", "hydra: {overrides: {task: 3}}"])
def test_a_damaged_record_of_a_sweep_is_reported_in_one_message(command, tmp_path, content):
    (tmp_path / "multirun.yaml").write_text(content)
    status, _, error = command("sweep.resume=.")
    assert status == 1
    assert error.startswith("Error: multirun.yaml ")
    assert error.count("\n") == 1


def test_two_processes_cannot_run_the_same_sweep(command, tmp_path):
    assert command("-m", *LEAN, "seed=0,1", "hydra.sweep.dir=sweep")[0] == 0
    before = (tmp_path / "sweep/multirun.yaml").read_text()
    with files.exclusive(tmp_path / "sweep"):
        for arguments in (["sweep.resume=sweep"], ["-m", *TINY, "seed=5,6", "hydra.sweep.dir=sweep"]):
            status, printed, error = command(*arguments)
            assert (status, printed) == (1, "")
            assert error.startswith("Error: Another process is using sweep.")
    assert (tmp_path / "sweep/multirun.yaml").read_text() == before
    assert command("sweep.resume=sweep")[0] == 0


def test_the_command_printed_after_ctrl_c_resumes_the_sweep(command, tmp_path):
    name = "my sweep (a)"
    begin = ["-m", *TINY, "trainer.max_epochs=2", "optimizer.lr=0.01,0.02", f"hydra.sweep.dir='{name}'"]
    for arguments in ([*begin, signal_at(0, 2, signal.SIGINT)],):
        status, _, error = command(*arguments)
        assert status == 130
    resume = shlex.split(error.split("cifarnet.train ")[-1])
    assert resume == [f"sweep.resume='{name}'"]
    status, printed, error = command(*resume, ALLOW_SIGNAL)  # which stops job 1 at the same batch
    assert status == 130, error
    assert shlex.split(error.split("cifarnet.train ")[-1]) == resume
    status, printed, error = command(*resume, ALLOW_SIGNAL)
    assert status == 0, error
    assert "2 of 2 jobs done" in printed


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send itself these signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_parallel_jobs_save(command, tmp_path, number):
    begin = ["-m", *TINY, "trainer.max_epochs=100000", "seed=range(3)", "threads=1", "hydra/launcher=parallel"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cifarnet.train",
            *begin,
            "hydra.launcher.n_jobs=2",
            f"hydra.sweep.dir={tmp_path}/sweep",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    begun: set[str] = set()
    for line in process.stdout:
        if found := re.match(r"\[([01])\] Epoch 3/", line):
            begun.add(found[1])
        if begun == {"0", "1"}:
            break
    workers = psutil.Process(process.pid).children()
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C does
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert f"sweep.resume={os.path.relpath(tmp_path / 'sweep')}" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert "0 of 3 jobs done" in printed
    for job in "01":
        batch = torch.load(tmp_path / "sweep" / job / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert batch >= 12
        assert f"[{job}] Finishing the batch" in error
    assert not (tmp_path / "sweep/2").exists()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take half a second")
def test_a_computing_process_ends_at_once_with_its_parent():
    job = "import os; from cifarnet.system import hardware; hardware.end_with_parent(os.getppid()); "
    job += "print('ready', flush=True); "
    job += "import re; re.match('(a+)+b', 'a' * 100)"  # blocks all other threads
    start = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {job!r}]); print(p.pid, flush=True); "
    parent = subprocess.Popen([sys.executable, "-c", start + "p.wait()"], stdout=subprocess.PIPE, text=True)
    printed = {parent.stdout.readline().strip() for _ in range(2)}
    child = psutil.Process(int((printed - {"ready"}).pop()))
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs([child], timeout=5)
    for process in alive:
        process.kill()
    assert not alive


def test_processes_end_with_their_parent():
    job = "import os; from cifarnet.system import hardware; hardware.end_with_parent(os.getppid()); "
    job += "print('ready', flush=True); "
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
