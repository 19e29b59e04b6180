"""Two processes on a CPU give what one process gives. (Nothing runs on GPUs.)"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import nn

from cifarnet.checkpoint import Checkpoint
from cifarnet.data.loader import InMemoryLoader
from cifarnet.errors import Interrupted, UserError
from cifarnet.models import Normalize
from cifarnet.resuming import resume
from cifarnet.system import distributed
from cifarnet.train import train
from conftest import SMALL, TWO, assert_close_weights, assert_same_weights, small

# 9 and 8 images of each batch; augmentation, selection and averages that depend on the whole data set
RECIPE = [
    *("data.batch_size=17", "data.hardest_share=0.7", "data.cutout=8", "data.eval_batch_size=7"),
    *("module.tta=mirror", "module.tta_share=0.3", "+recipe=[trivialaugment,mixup,ema]", "recipe.ema.decay=0.5"),
    *("trainer.max_epochs=3", "optimizer.lr=0.05"),
]
ALLOW = "classes=[test_distributed.InRank]"
LISTENING = "+callbacks.listening={_target_: test_distributed.Listening}"


BUG, MISTAKE = -1, 0


class InRank(Callback):
    """Sends a signal, or raises an error, in one rank after a batch of an epoch (both count from 0)."""

    def __init__(self, rank: int, epoch: int, batch: int, number: int, to_parent: bool = False) -> None:
        self.rank, self.moment, self.number, self.to_parent = rank, (epoch, batch), number, to_parent

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == self.rank and (trainer.current_epoch, batch_idx) == self.moment:
            if self.number == BUG:
                raise IndexError("a bug in this rank")
            if self.number == MISTAKE:
                raise UserError("something is wrong in this rank")
            os.kill(os.getppid() if self.to_parent else os.getpid(), self.number)


class Gather(Callback):
    """Calls a collective operation after each batch: it hangs if any rank calls another one."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        assert len(distributed.all_gather(outputs["loss"])) == trainer.world_size


class Listening(Callback):
    """Records the addresses at which a rank and the process that started it listen, before training and after it."""

    def on_fit_start(self, trainer, module):
        processes = [psutil.Process(), psutil.Process(os.getppid())]
        connections = [connection for process in processes for connection in process.net_connections("tcp")]
        addresses = [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]
        name = f"listening_{trainer.global_rank}_{trainer.current_epoch}.json"
        Path(trainer.default_root_dir, name).write_text(json.dumps(addresses))

    on_fit_end = on_fit_start


def in_rank(rank: int, epoch: int, batch: int, number: int, to_parent: bool = False) -> str:
    fields = f"rank: {rank}, epoch: {epoch}, batch: {batch}, number: {int(number)}, to_parent: {to_parent}"
    return f"+callbacks.in_rank={{_target_: test_distributed.InRank, {fields}}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run by one process and of the same run by two."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, settings in {"one": ["trainer=cpu", "threads=1"], "two": TWO}.items():
        train(small(f"output_dir={folder / name}", *settings, *RECIPE, LISTENING, without="trainer=cpu"))
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_two_processes_give_the_weights_of_one_except_for_rounding(runs):
    assert_close_weights(runs / "one", runs / "two")


def test_two_processes_record_what_one_does(runs):
    one, two = record(runs / "one"), record(runs / "two")
    assert two["hardware"]["ranks"] == 2
    for key in ("val_accuracy", "test_accuracy", "test_accuracy_one_view", "tested_epoch", "data", "parameters"):
        assert one[key] == two[key], key
    assert two["test_cross_entropy"] == pytest.approx(one["test_cross_entropy"], rel=1e-5)
    for before, after in zip(one["history"], two["history"], strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    for picture in ("predictions.png", "confusion_matrix.png"):
        assert (runs / "one" / picture).read_bytes() == (runs / "two" / picture).read_bytes()
    files = [
        {path.name for path in (runs / name).iterdir() if not re.match("events|listening", path.name)}
        for name in ("one", "two")
    ]
    assert files[0] == files[1] - {"train.log"}  # from Python, only launched processes write a log


def test_launched_processes_listen_only_on_the_loopback_interface(runs):
    """Whoever could connect to them could send them pickled objects."""
    addresses = [json.loads(file.read_text()) for file in (runs / "two").glob("listening_*")]
    assert len(addresses) == 4  # two ranks, before and after training
    assert {address for member in addresses for address in member} == {"127.0.0.1"}


def exchange(rank: int, folder: Path) -> None:
    """Send two runs from rank 0 to rank 1 without pickling anything."""
    variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= variables
    os.environ.pop(distributed.LAUNCHED, None)
    torch.distributed.init_process_group("gloo", (folder / "store").as_uri(), rank=rank, world_size=2)
    torch.distributed.broadcast_object_list = None
    runs = [{"config": {"name": "naïve"}, "ckpt_path": None}, {"config": {}, "ckpt_path": "x" * 9999}]
    if rank == 0:
        for run in runs:
            distributed.send_run(run, folder)
            assert not (folder / "run.json").exists()
        distributed._broadcast("")  # there are no more runs
    else:
        assert [distributed.receive_run() for _ in range(3)] == [*runs, None]
    torch.distributed.destroy_process_group()


def test_under_torchrun_the_other_ranks_read_a_run_from_a_file(tmp_path):
    torch.multiprocessing.spawn(exchange, (tmp_path,), nprocs=2)


def torchrun(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run `python -m cifarnet.train` on two processes that torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [setting for setting in SMALL if not setting.startswith("trainer.max_epochs")]
    return subprocess.run(
        [*launcher, "-m", "cifarnet.train", *settings, *RECIPE, *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_torchrun_gives_the_same_weights(runs, tmp_path):
    result = torchrun(tmp_path, "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("test accuracy") == 1  # printed by one rank
    assert_same_weights(runs / "two/checkpoints/last.ckpt", tmp_path / "run/checkpoints/last.ckpt")


@pytest.mark.slow
def test_torchrun_trains_the_jobs_of_a_sweep(runs, tmp_path):
    result = torchrun(tmp_path, "-m", "seed=1,0", "hydra.sweep.dir=sweep")
    assert result.returncode == 0, result.stderr
    assert "2 of 2 jobs done" in result.stdout
    assert_same_weights(runs / "two/checkpoints/last.ckpt", tmp_path / "sweep/1/checkpoints/last.ckpt")
    assert record(tmp_path / "sweep/0")["hardware"]["ranks"] == 2


def test_a_job_of_one_process_ends_without_an_error():
    """As in a job of SLURM with one task, which has no process group."""
    called = []
    distributed.run_ranks(lambda: called.append("command"), called.append)
    assert called == ["command"]


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_reported_once(tmp_path):
    result = torchrun(tmp_path, "optimizer.lrr=1")
    assert result.returncode == 1
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error: optimizer.lrr")]) == 1
    assert "cifarnet/train.py" not in result.stderr  # no traceback of ours


@pytest.mark.parametrize(("rank", "to_parent"), [(0, True), (1, False)], ids=["to the parent", "to rank 1"])
def test_a_signal_stops_all_ranks_and_the_resumed_run_equals_an_uninterrupted_one(
    runs, config, tmp_path, rank, to_parent
):
    settings = [*TWO, *RECIPE, in_rank(rank, 1, 1, signal.SIGTERM, to_parent), ALLOW]
    # the parent may forward the signal after the last batch of the epoch
    message = r"Stopped by SIGTERM after (batch \d of )?epoch 2.*\n.* ckpt_path=/"
    with pytest.raises(Interrupted, match=message) as stopped:
        train(config(*settings, without="trainer=cpu"))
    assert stopped.value.status == 143
    assert Checkpoint.open(tmp_path / "run/checkpoints/last.ckpt").step > 0
    train(*resume(tmp_path / "run", [ALLOW]))
    assert_same_weights(runs / "two/checkpoints/last.ckpt", tmp_path / "run/checkpoints/last.ckpt")
    assert record(tmp_path / "run")["history"] == record(runs / "two")["history"]


def test_ctrl_c_in_a_terminal_stops_all_ranks_and_prints_the_command_that_resumes(tmp_path):
    """A terminal sends the signal to the command and to all of its ranks."""
    settings = [setting for setting in SMALL if not setting.startswith(("trainer=", "trainer.max_epochs"))]
    (tmp_path / "temporary").mkdir()
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TMPDIR": f"{tmp_path}/temporary"}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cifarnet.train",
            *settings,
            *TWO,
            "trainer.max_epochs=10000",
            "hydra.run.dir=run",
        ],
        cwd=tmp_path,
        env=os.environ | variables,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Epoch 2/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    printed, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert error.count("Stopped by SIGINT") == 1
    assert f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt" in error
    assert "Traceback" not in printed + error
    assert Checkpoint.open(tmp_path / "run/checkpoints/last.ckpt").step >= 5
    assert not (tmp_path / "run/run.json").exists()
    assert not list((tmp_path / "temporary").iterdir())


def test_a_rank_that_is_killed_is_reported_and_the_run_can_be_resumed_by_one_process(runs, config, tmp_path):
    settings = [*TWO, *RECIPE, in_rank(1, 1, 0, signal.SIGKILL), ALLOW]
    with pytest.raises(UserError, match=r"Rank 1 was ended by SIGKILL\. Resume .*\n.* ckpt_path=/"):
        train(config(*settings, without="trainer=cpu"))
    train(*resume(tmp_path / "run", ["trainer=cpu", "threads=1", ALLOW]))
    assert record(tmp_path / "run")["val_accuracy"] == record(runs / "one")["val_accuracy"]
    assert_close_weights(runs / "one", tmp_path / "run")


@pytest.mark.slow
def test_a_run_of_one_process_can_be_resumed_by_two(runs, config, tmp_path):
    settings = ["threads=1", *RECIPE, in_rank(0, 1, 1, signal.SIGTERM), ALLOW]
    with pytest.raises(Interrupted, match="after batch 2 of epoch 2"):
        train(config(*settings))
    train(*resume(tmp_path / "run", [*TWO, ALLOW]))
    assert record(tmp_path / "run")["hardware"]["ranks"] == 2
    assert record(tmp_path / "run")["val_accuracy"] == record(runs / "one")["val_accuracy"]
    assert_close_weights(runs / "one", tmp_path / "run")


def test_callbacks_cannot_be_passed_to_several_processes(config):
    with pytest.raises(UserError, match=r"cannot be passed to 2 processes: add them to the config"):
        train(config(*TWO, without="trainer=cpu"), callbacks=[Gather()])


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_devices_need_as_many_processes(monkeypatch, strategy):
    clear_launchers(monkeypatch)
    section = {"accelerator": "cpu", "strategy": strategy}
    assert distributed.num_processes(section | {"devices": 2}) == 2
    assert distributed.num_processes(section | {"devices": 1}) == 1


def test_several_machines_need_torchrun_or_srun(monkeypatch):
    clear_launchers(monkeypatch)
    with pytest.raises(UserError, match=r"trainer\.num_nodes=2: .*torchrun or srun"):
        distributed.trainer_settings({"num_nodes": 2})
    assert distributed.trainer_settings({"devices": 1}) == {}


def test_the_number_of_started_processes_sets_the_devices(monkeypatch):
    clear_launchers(monkeypatch)
    variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expected = {"devices": 3, "num_nodes": 2, "strategy": "ddp"}
    for devices in (1, 3, -1, "auto"):
        assert distributed.trainer_settings({"devices": devices}) == expected
        assert distributed.num_processes({"devices": devices}) == 1  # they have been started already
    with pytest.raises(UserError, match=r"trainer\.devices=2: 3 processes were started"):
        distributed.trainer_settings({"devices": 2})


def clear_launchers(monkeypatch) -> None:
    """Remove the environment variables of torchrun and SLURM."""
    for name in list(os.environ):
        if re.match("SLURM|TORCHELASTIC|RANK|WORLD|LOCAL_", name):
            monkeypatch.delenv(name)


def test_srun_needs_the_number_of_processes_per_machine(monkeypatch):
    clear_launchers(monkeypatch)
    for name, value in {"PROCID": 0, "NTASKS": 2, "STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with pytest.raises(UserError, match="use --ntasks-per-node=2 instead of --ntasks"):
        distributed.environment()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "fsdp"])
def test_other_strategies_are_refused(config, strategy):
    with pytest.raises(UserError, match=f"trainer.strategy={strategy} is not supported. Choose trainer=ddp"):
        train(config(*TWO, f"trainer.strategy={strategy}", without="trainer=cpu"))


class SignalInTest(Callback):
    """Sends rank 0 a signal in the test."""

    def on_test_batch_start(self, trainer, *_):
        if trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_the_test_of_two_processes_is_reported(config, tmp_path):
    settings = ["+callbacks.in_test={_target_: test_distributed.SignalInTest}"]
    with pytest.raises(Interrupted, match="Stopped by SIGTERM after training, during the test"):
        train(config(*TWO, *settings, without="trainer=cpu"))
    assert not (tmp_path / "run/metrics.json").exists()


class ExpectResolved(Callback):
    def __init__(self, path: str, steps: int) -> None:
        assert (path, steps) == ("/somewhere/else", 0)  # total_steps is not known yet

    def on_train_start(self, trainer, module):
        assert trainer.world_size == 2


@pytest.mark.slow
def test_resolvers_are_replaced_by_their_values_for_other_processes(config):
    OmegaConf.register_new_resolver("only_here", lambda: "/somewhere", replace=True)
    arguments = "path: '${only_here:}/else', steps: '${total_steps}'"
    callback = f"+callbacks.resolved={{_target_: test_distributed.ExpectResolved, {arguments}}}"
    train(config(*TWO, callback, without="trainer=cpu"))


@pytest.mark.slow
def test_metrics_of_a_run_that_ends_within_an_epoch_are_of_all_ranks(config, tmp_path):
    limits = ["data.batch_size=16", "+trainer.max_steps=7", "+trainer.limit_test_batches=2", "data.eval_batch_size=10"]
    train(config("threads=1", *limits, "callbacks.pictures=null", folder="one"))
    train(config(*TWO, *limits, folder="two", without="trainer=cpu"))
    one, two = (record(tmp_path / name)["history"][-1]["train/cross_entropy"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_ranks_under_srun_end_silently_with_rank_0(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {f"SLURM_{name}": "2" for name in ("NTASKS", "NTASKS_PER_NODE", "STEP_NUM_TASKS")}
    env |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "MASTER_PORT": port}
    for setting, statuses in {"--help": [0, 0], "optimizer.lrr=1": [1, 1]}.items():
        ranks_of_it = [
            subprocess.Popen(
                [sys.executable, "-m", "cifarnet.train", setting],
                env=env | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in "01"
        ]
        (_, error), (out, other) = [process.communicate(timeout=100) for process in ranks_of_it]
        assert [process.returncode for process in ranks_of_it] == statuses, (error, other)
        assert (out, "Traceback" in error + other) == ("", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"),
    [(MISTAKE, "something is wrong in this rank$"), (BUG, r"Traceback [\s\S]*IndexError: a bug in this rank")],
)
def test_the_error_of_the_rank_that_failed_first_is_reported(config, number, message):
    """Not that of rank 0, which then loses the connection."""
    with pytest.raises(UserError, match=f"Rank 1 failed: {message}"):
        train(config(*TWO, in_rank(1, 0, 1, number), ALLOW, without="trainer=cpu"))


def test_each_job_of_a_sweep_starts_its_own_processes(command, tmp_path):
    settings = [setting for setting in SMALL if setting != "trainer=cpu"]
    status, out, error = command("-m", *settings, *TWO, "trainer.devices=1,2", "hydra.sweep.dir=sweep")
    assert (status, error) == (0, "")
    assert "2 of 2 jobs done" in out
    assert [record(tmp_path / "sweep" / job)["hardware"].get("ranks", 1) for job in "01"] == [1, 2]


def test_runs_on_several_devices_side_by_side_are_refused(command):
    settings = [setting for setting in SMALL if setting != "trainer=cpu"]
    status, _, error = command("-m", *settings, *TWO, "seed=0,1", "hydra/launcher=parallel", "hydra.sweep.dir=sweep")
    assert status == 1
    assert "trainer.devices=2" in error
    assert "Remove hydra/launcher" in error


CHOICES = {
    "muon, accumulated, clipped": [
        "optimizer=muon",
        "+trainer.gradient_clip_val=1",
        "+trainer.accumulate_grad_batches=2",
    ],
    "collective operations": ["+callbacks.a={_target_: test_distributed.Gather}"],
    "averaged": ["+recipe.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"],
    "frozen": ["+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: features, epoch: 2}"],
    "sam, frozen": [
        "+recipe=sam",
        "data.batch_size=17",
        "+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: features, epoch: 2}",
    ],
    "lean, in bfloat16": ["callbacks=lean", "trainer.precision=bf16-mixed", "~logger"],
}


@pytest.mark.slow  # together a minute or two
@pytest.mark.parametrize("settings", CHOICES.values(), ids=CHOICES)
def test_other_choices_give_the_same_result_on_two_processes(config, tmp_path, settings):
    train(config("threads=1", *settings, folder="one"))
    train(config(*TWO, *settings, folder="two", without="trainer=cpu"))
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    close = 1e-2 if "trainer.precision=bf16-mixed" in settings else 1e-5
    assert two["test_cross_entropy"] == pytest.approx(one["test_cross_entropy"], rel=close)
    losses = [[row["train/cross_entropy"] for row in run["history"]] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=close)


class Unused(nn.Module):
    """A network with weights that it does not use."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(Normalize(), nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.layers(images)


@pytest.mark.slow
def test_weights_without_a_gradient_are_reported(config):
    custom = ["~model", "+model={_target_: test_distributed.Unused}"]
    with pytest.raises(UserError, match="ddp_find_unused_parameters_true"):
        train(config(*TWO, *custom, without=("trainer=cpu", "model")))


def loaders(count: int, world_size: int, **settings):
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 8, 8)
    labels = torch.arange(count) % 10
    settings |= {"world_size": world_size}
    return [InMemoryLoader(images, labels, 10, rank=rank, **settings) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_divide_each_training_batch(world_size):
    [whole] = loaders(47, 1, train=True, seed=3)
    for batch, *parts in zip(whole, *loaders(47, world_size, train=True, seed=3), strict=True):
        assert {len(part.labels) for part in parts} <= {10 // world_size, -(-10 // world_size)}
        for name in ("images", "labels", "index"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_evaluate_every_image_once_in_order(world_size):
    parts = [torch.cat([batch.index for batch in loader]) for loader in loaders(47, world_size)]
    assert torch.equal(torch.cat(parts), torch.arange(47))
    for loader in loaders(47, world_size):
        assert len(loader) == len(list(loader))


@pytest.mark.parametrize(
    ("variables", "placement"),
    [
        ({}, (0, 1, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (0, 1, 1)),  # a batch script
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, (3, 8, 4)),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 4)),
    ],
)
def test_the_placement_of_a_process_is_read_from_its_environment(monkeypatch, variables, placement):
    clear_launchers(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.placement() == placement


@pytest.mark.slow
def test_more_devices_than_images_of_a_batch_are_refused(config):
    with pytest.raises(UserError, match=r"2 devices .* batches of 1 images: use 1 devices or fewer"):
        train(config(*TWO, "data.batch_size=1", without="trainer=cpu"))
