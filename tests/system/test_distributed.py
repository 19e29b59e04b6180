"""Two processes of a CPU against one. (On GPUs nothing here is run.)"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import nn

from cifarnet.data.loader import InMemoryLoader
from cifarnet.errors import Interrupted, UserError
from cifarnet.models import Normalize
from cifarnet.resuming import resume
from cifarnet.system import distributed
from cifarnet.train import train
from conftest import SMALL, assert_same_weights, small, weights

TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
# shares of 9 and 8 images; what is drawn, chosen and averaged over the whole data set
ALL_AT_ONCE = ["data.batch_size=17", "data.hardest_share=0.7", "module.tta=mirror", "data.cutout=8"]
ALL_AT_ONCE += [
    "+recipe=[trivialaugment,mixup,ema]",
    "recipe.ema.decay=0.5",
    "module.tta_share=0.3",
    "data.eval_batch_size=7",
    "trainer.max_epochs=3",
    "optimizer.lr=0.05",
]


class InRank(Callback):
    """Does something to one rank after a batch of an epoch (both count from 0)."""

    def __init__(self, rank: int, epoch: int, batch: int, number: int) -> None:
        self.rank, self.moment, self.number = rank, (epoch, batch), number

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == self.rank and (trainer.current_epoch, batch_idx) == self.moment:
            if self.number == 0:
                raise UserError("something is wrong here alone")
            os.kill(os.getpid(), self.number)


class Asks(Callback):
    """Asks all ranks after each batch: one that acts elsewhere in their order would wait for ever."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        assert len(distributed.all_gather(outputs["loss"])) == trainer.world_size


def in_rank(rank: int, epoch: int, batch: int, number: int) -> str:
    fields = f"rank: {rank}, epoch: {epoch}, batch: {batch}, number: {int(number)}"
    return f"+callbacks.in_rank={{_target_: test_ranks.InRank, {fields}}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs by one process and by two."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, settings in {"one": ["trainer=cpu", "threads=1"], "two": TWO}.items():
        train(small(f"output_dir={folder / name}", *settings, *ALL_AT_ONCE, without="trainer=cpu"))
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_two_processes_train_as_one_but_for_rounding(runs):
    one, two = (weights(runs / name / "checkpoints/last.ckpt") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_two_processes_report_what_one_does(runs):
    one, two = record(runs / "one"), record(runs / "two")
    assert two["hardware"]["ranks"] == 2
    for key in ("val_accuracy", "test_accuracy", "test_accuracy_one_view", "tested_epoch", "data", "parameters"):
        assert one[key] == two[key], key
    assert two["test_cross_entropy"] == pytest.approx(one["test_cross_entropy"], rel=1e-5)
    for before, after in zip(one["history"], two["history"], strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    for picture in ("predictions.png", "confusion_matrix.png"):
        assert (runs / "one" / picture).read_bytes() == (runs / "two" / picture).read_bytes()
    files = [{path.name for path in (runs / name).iterdir() if "events" not in path.name} for name in ("one", "two")]
    assert files[0] == files[1]


def test_torchrun_gives_the_same_weights(runs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [setting for setting in SMALL if not setting.startswith("trainer.max_epochs")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "cifarnet.train", *settings, *ALL_AT_ONCE, "hydra.run.dir=run"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1  # one rank speaks
    assert_same_weights(runs / "two/checkpoints/last.ckpt", tmp_path / "run/checkpoints/last.ckpt")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on(runs, config, tmp_path, rank):
    settings = [*TWO, *ALL_AT_ONCE, in_rank(rank, 1, 1, signal.SIGTERM), "classes=[test_ranks.InRank]"]
    with pytest.raises(Interrupted, match=r"Stopped by SIGTERM after batch [34] of epoch 2") as stopped:
        train(config(*settings, without="trainer=cpu"))
    assert stopped.value.status == 143
    train(*resume(tmp_path / "run", ["classes=[test_ranks.InRank]"]))
    assert_same_weights(runs / "two/checkpoints/last.ckpt", tmp_path / "run/checkpoints/last.ckpt")
    assert record(tmp_path / "run")["history"] == record(runs / "two")["history"]


def test_a_rank_that_is_killed_ends_the_run_which_goes_on_with_one(runs, config, tmp_path):
    settings = [*TWO, *ALL_AT_ONCE, in_rank(1, 1, 0, signal.SIGKILL), "classes=[test_ranks.InRank]"]
    with pytest.raises(UserError, match=r"Rank 1 was ended by SIGKILL\. Go on with: .* ckpt_path=/"):
        train(config(*settings, without="trainer=cpu"))
    train(*resume(tmp_path / "run", ["trainer=cpu", "threads=1", "classes=[test_ranks.InRank]"]))
    assert record(tmp_path / "run")["val_accuracy"] == record(runs / "one")["val_accuracy"]
    one, other = (weights(path / "checkpoints/last.ckpt") for path in (runs / "one", tmp_path / "run"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(runs, config, tmp_path):
    settings = ["threads=1", *ALL_AT_ONCE, in_rank(0, 1, 1, signal.SIGTERM), "classes=[test_ranks.InRank]"]
    with pytest.raises(Interrupted, match="after batch 3 of epoch 2"):
        train(config(*settings))
    train(*resume(tmp_path / "run", [*TWO, "classes=[test_ranks.InRank]"]))
    assert record(tmp_path / "run")["hardware"]["ranks"] == 2
    assert record(tmp_path / "run")["val_accuracy"] == record(runs / "one")["val_accuracy"]
    one, other = (weights(path / "checkpoints/last.ckpt") for path in (runs / "one", tmp_path / "run"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_callbacks_that_would_act_on_one_rank_are_refused(config):
    with pytest.raises(UserError, match=r"Asks, given to train\(\), would act on one of 2 ranks.*\+callbacks"):
        train(config(*TWO, without="trainer=cpu"), callbacks=[Asks()])


def test_srun_has_to_say_how_many_there_are_on_each_machine(monkeypatch):
    for name in list(os.environ):
        if re.match("SLURM|TORCHELASTIC", name):
            monkeypatch.delenv(name)
    for name, value in {"PROCID": 0, "NTASKS": 2, "STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with pytest.raises(UserError, match="give --ntasks-per-node=2 in place of --ntasks"):
        distributed.environment()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "fsdp"])
def test_other_strategies_are_refused(config, strategy):
    with pytest.raises(UserError, match=f"trainer.strategy={strategy} is not supported. Choose trainer=ddp"):
        train(config(*TWO, f"trainer.strategy={strategy}", without="trainer=cpu"))


class InTest(Callback):
    """Sends rank 0 a signal in the test."""

    def on_test_batch_start(self, trainer, *_):
        if trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_the_test_of_two_is_not_lost(config, tmp_path):
    settings = ["+callbacks.in_test={_target_: test_ranks.InTest}", "classes=[test_ranks.InTest]"]
    with pytest.raises(Interrupted, match="Stopped by SIGTERM after training, in the test"):
        train(config(*TWO, *settings, without="trainer=cpu"))
    assert not (tmp_path / "run/metrics.json").exists()


class Noted(Callback):
    def __init__(self, path: str, steps: int) -> None:
        assert (path, steps) == ("/somewhere/else", 0)  # total_steps is known later

    def on_train_start(self, trainer, module):
        assert trainer.world_size == 2


@pytest.mark.slow
def test_other_ranks_are_told_what_only_the_first_can_resolve(config):
    OmegaConf.register_new_resolver("only_here", lambda: "/somewhere", replace=True)
    noted = "+callbacks.noted={_target_: test_ranks.Noted, path: '${only_here:}/else', steps: '${total_steps}'}"
    train(config(*TWO, noted, "classes=[test_ranks.Noted]", without="trainer=cpu"))


@pytest.mark.slow
def test_figures_of_a_run_that_ends_within_an_epoch_are_of_all_ranks(config, tmp_path):
    limits = ["data.batch_size=16", "+trainer.max_steps=7", "+trainer.limit_test_batches=2", "data.eval_batch_size=10"]
    train(config("threads=1", *limits, "callbacks.pictures=null", folder="one"))
    train(config(*TWO, *limits, folder="two", without="trainer=cpu"))
    one, two = (record(tmp_path / name)["history"][-1]["train/cross_entropy"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_ranks_under_srun_end_without_a_word_when_the_first_does(tmp_path):
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
def test_an_error_in_one_rank_alone_is_told(config):
    with pytest.raises(UserError, match=r"Rank 1 failed: .*something is wrong here alone"):
        train(config(*TWO, in_rank(1, 0, 1, 0), "classes=[test_ranks.InRank]", without="trainer=cpu"))


def test_a_sweep_trains_each_job_in_processes_of_its_own(command, tmp_path):
    settings = [setting for setting in SMALL if setting != "trainer=cpu"]
    status, out, error = command("-m", *settings, *TWO, "trainer.devices=1,2", "hydra.sweep.dir=sweep")
    assert (status, error) == (0, "")
    assert "2 of 2 jobs done" in out
    assert [record(tmp_path / "sweep" / job)["hardware"].get("ranks", 1) for job in "01"] == [1, 2]


def test_runs_on_several_devices_side_by_side_are_refused(command):
    settings = [setting for setting in SMALL if setting != "trainer=cpu"]
    status, _, error = command("-m", *settings, *TWO, "seed=0,1", "hydra/launcher=parallel", "hydra.sweep.dir=sweep")
    assert status == 1
    assert "Runs on several devices are trained one after the other: leave out hydra/launcher" in error


OTHERS = {
    "muon, accumulated, clipped": [
        "optimizer=muon",
        "+trainer.gradient_clip_val=1",
        "+trainer.accumulate_grad_batches=2",
    ],
    "asking": ["+callbacks.a={_target_: test_ranks.Asks}"],
    "averaged": ["+recipe.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"],
    "frozen": ["+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: features, epoch: 2}"],
    "climbing, frozen": [
        "+recipe=sam",
        "data.batch_size=17",
        "+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: features, epoch: 2}",
    ],
    "lean, in bfloat16": ["callbacks=lean", "trainer.precision=bf16-mixed", "~logger"],
}


@pytest.mark.slow  # together a minute or two
@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_other_choices_train_on_two_as_on_one(config, tmp_path, settings):
    train(config("threads=1", *settings, folder="one"))
    train(config(*TWO, *settings, folder="two", without="trainer=cpu"))
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    close = 1e-2 if "trainer.precision=bf16-mixed" in settings else 1e-5
    assert two["test_cross_entropy"] == pytest.approx(one["test_cross_entropy"], rel=close)
    losses = [[row["train/cross_entropy"] for row in of["history"]] for of in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=close)


class Unused(nn.Module):
    """A network with a weight that no image reaches."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(Normalize(), nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.layers(images)


@pytest.mark.slow
def test_weights_without_a_gradient_are_told(config):
    own = ["~model", "+model={_target_: test_ranks.Unused}", "classes=[test_ranks.Unused]"]
    with pytest.raises(UserError, match="ddp_find_unused_parameters_true"):
        train(config(*TWO, *own, without=("trainer=cpu", "model")))


def loaders(count: int, ranks: int, **settings):
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 8, 8)
    labels = torch.arange(count) % 10
    return [InMemoryLoader(images, labels, 10, rank=rank, ranks=ranks, **settings) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_each_training_batch(ranks):
    [whole] = loaders(47, 1, train=True, seed=3)
    for batch, *shares in zip(whole, *loaders(47, ranks, train=True, seed=3), strict=True):
        assert {len(share[1]) for share in shares} <= {10 // ranks, -(-10 // ranks)}
        for of_all, of_each in zip(batch, zip(*shares, strict=True), strict=True):
            assert torch.equal(of_all, torch.cat(of_each))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_go_through_all_images_once_in_order(ranks):
    parts = [torch.cat([batch[2] for batch in loader]) for loader in loaders(47, ranks)]
    assert torch.equal(torch.cat(parts), torch.arange(47))
    for loader in loaders(47, ranks):
        assert len(loader) == len(list(loader))


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (0, 1, 1)),  # a batch script
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, (3, 8, 4)),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 4)),
    ],
)
def test_a_rank_knows_its_place(monkeypatch, environment, place):
    for name in list(os.environ):
        if re.match("SLURM|TORCHELASTIC|RANK|WORLD", name):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.place() == place


@pytest.mark.slow
def test_more_devices_than_images_of_a_batch_are_refused(config):
    with pytest.raises(UserError, match="2 devices share batches of 1 images: use 1 devices or fewer"):
        train(config(*TWO, "data.batch_size=1", without="trainer=cpu"))
