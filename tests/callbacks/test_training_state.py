import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cifarnet import classifier
from cifarnet.callbacks import training_state
from cifarnet.callbacks.training_state import TrainingState
from cifarnet.classifier import Classifier
from cifarnet.data import InMemoryLoader
from cifarnet.seeding import derive

IMAGES = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

LOOPS = {"fit_loop": {"epoch_loop.batch_progress": {"total": {"processed": 5, "completed": 5}}}}


class Run:
    """A callback, a loader, and a module as a trainer sets them up."""

    def __init__(self, share: float = 0.5, state: dict | None = None) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 50))
        network.forward = lambda images: nn.Sequential.forward(network, images / 255)
        self.module = Classifier(network, partial(torch.optim.SGD, lr=0.1))
        self.loader = InMemoryLoader(IMAGES, torch.arange(50), 5, train=True, share=share, seed=5)
        epoch_loop = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=1)))
        self.trainer = SimpleNamespace(
            train_dataloader=self.loader,
            current_epoch=1,
            callbacks=[],
            checkpoint_callbacks=[],
            accumulate_grad_batches=1,
            lr_scheduler_configs=[],
            fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
        )
        self.module._trainer = self.trainer
        self.callback = TrainingState()
        if state is not None:
            self.callback.load_state_dict(state)
        self.start()

    def start(self) -> None:
        self.callback.on_train_start(self.trainer, self.module)

    def train(self, epoch: int, batches: int = 100) -> list[list[int]]:
        """Take steps, without learning, and return the images of each."""
        self.loader.set_epoch(epoch)
        seen = []
        for place, batch in zip(range(batches), self.loader, strict=False):
            outputs = self.module.training_step(batch, place)
            self.callback.on_train_batch_end(self.trainer, self.module, outputs, batch, place)
            seen.append(batch.index.tolist())
        return seen


@pytest.mark.parametrize("further", [{}, {"cuda": torch.zeros(16, dtype=torch.uint8)}], ids=["", "saved on a GPU"])
def test_training_continues_in_the_middle_of_an_epoch(further, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)  # it must not be called on a CPU
    whole, stopped = Run(), Run()
    assert whole.train(0) == stopped.train(0)
    seen = stopped.train(1, batches=2)
    state = copy.deepcopy(stopped.callback.state_dict())
    state["generators"][0] |= further
    drawn = torch.rand(2).tolist()
    resumed = Run(state=state)
    assert torch.rand(2).tolist() == drawn
    assert whole.train(1) == seen + resumed.train(1)
    assert whole.module.means("train") == resumed.module.means("train")
    assert whole.train(2) == resumed.train(2)  # the losses of both parts of the epoch decide


def test_state_is_restored_once():
    run = Run()
    run.train(1, batches=2)
    resumed = Run(state=run.callback.state_dict())
    first = torch.rand(2).tolist()
    resumed.start()
    assert torch.rand(2).tolist() != first
    assert len(resumed.train(1)) == len(run.loader) - 2
    assert len(resumed.train(1)) == len(run.loader)


def test_losses_are_passed_to_a_loader_that_selects(monkeypatch):
    observed = {}
    for share in (1.0, 0.5):
        run = Run(share)
        monkeypatch.setattr(run.loader, "observe", lambda *arguments, share=share: observed.update({share: arguments}))
        (index,) = run.train(0, batches=1)
    assert list(observed) == [0.5]
    positions, losses = observed[0.5]
    assert positions.tolist() == index
    expected = nn.functional.cross_entropy(run.module(IMAGES[index]), positions, reduction="none")
    torch.testing.assert_close(losses, expected.detach())


def test_there_is_no_state_before_training():
    callback = TrainingState()
    assert callback.state_dict() == {}
    callback.load_state_dict({})
    assert callback.restored is None


def test_sums_and_generators_of_a_gpu_are_restored(monkeypatch):
    """The GPU need not exist."""
    device, state, restored = torch.device("cuda", 1), torch.arange(16, dtype=torch.uint8), {}
    run = Run()
    monkeypatch.setattr(Classifier, "device", device)
    monkeypatch.setattr(torch.cuda, "get_rng_state", {device: state}.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state}))
    saved = run.callback.state_dict()
    saved["train_sums"] = [SimpleNamespace(to={device: "moved"}.__getitem__)]
    assert Run(state=saved).module.sums["train"] == "moved"
    assert list(restored) == [device]
    assert torch.equal(restored[device], state)


def test_each_rank_gets_its_generator_and_its_sums(monkeypatch):
    run = Run()
    run.train(1, batches=2)
    state = run.callback.state_dict()
    (sums,) = state["train_sums"]
    assert sums[2] == 10  # images
    state["train_sums"] = [sums, 2 * sums]
    generators = [torch.Generator().manual_seed(seed).get_state() for seed in (11, 12)]
    state["generators"] = [{"cpu": generator} for generator in generators]
    for rank, seed in [(0, 11), (1, 12), (2, derive(0, 1, "torch2"))]:  # rank 2 did not exist before
        for module in (training_state, classifier):
            monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        resumed = Run(state=state)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(resumed.module.sums["train"], 3 * sums if rank == 0 else 0 * sums)  # one rank, or three
        monkeypatch.setattr(training_state, "world_size", lambda: 2)
        if rank < 2:
            assert torch.equal(Run(state=state).module.sums["train"], state["train_sums"][rank])
        monkeypatch.undo()


def test_each_rank_gets_its_accumulated_gradients(monkeypatch):
    run = Run()
    run.train(1, batches=2)
    state = run.callback.state_dict()
    assert state["gradients"] == {}  # the optimizer has used them
    state["gradients"] = {"1.bias": [torch.full((50,), 1.0), torch.full((50,), 4.0)]}
    for ranks, rank, expected in [(2, 0, 1.0), (2, 1, 4.0), (1, 0, 2.5)]:
        monkeypatch.setattr(training_state, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(training_state, "world_size", lambda ranks=ranks: ranks)
        resumed = Run(state=copy.deepcopy(state))
        assert resumed.module.network.get_parameter("1.bias").grad.tolist() == [expected] * 50


def test_the_folder_of_a_run_can_be_moved(tmp_path):
    best = "/old/run/checkpoints/best.ckpt"
    paths = {"best_model_path": best, "kth_best_model_path": best, "last_model_path": "", "dirpath": "/old"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.ckpt").touch()
    other = {"epoch": 3}
    checkpoint = {"callbacks": {"best": paths | {"best_k_models": {best: 0.5}}, "other": dict(other)}}
    checkpoint["loops"] = LOOPS
    Run().callback.on_load_checkpoint(SimpleNamespace(default_root_dir=str(tmp_path)), None, checkpoint)
    moved = str(tmp_path / "checkpoints/best.ckpt")
    assert checkpoint["callbacks"]["best"] == {
        "best_model_path": moved,
        "kth_best_model_path": moved,
        "last_model_path": "",
        "dirpath": str(tmp_path / "checkpoints"),
        "best_k_models": {moved: 0.5},
    }
    assert checkpoint["callbacks"]["other"] == other


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ("/old/run/checkpoints/best.ckpt", "best.ckpt"),
        ("/old/run/checkpoints/epoch=1-val/accuracy=0.5.ckpt", "epoch=1-val/accuracy=0.5.ckpt"),
        ("/old/run/checkpoints/a/best.ckpt", "a/best.ckpt"),  # not the file of the same name in another folder
        *[(path, "") for path in ("", "..", ".", "/etc/x", "../x.ckpt", "a/../../x.ckpt", "/old/run/checkpoints")],
        *[(path, "") for path in ("link.ckpt", "folder.ckpt", "notes.txt", "nosuch.ckpt", "est.ckpt")],
    ],
)
def test_a_recorded_path_becomes_a_checkpoint_of_the_run_or_nothing(tmp_path, recorded, expected):
    folder = tmp_path / "run/checkpoints"
    for name in ("best.ckpt", "a/best.ckpt", "epoch=1-val/accuracy=0.5.ckpt", "notes.txt", "../../x.ckpt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "folder.ckpt").mkdir()
    (folder / "link.ckpt").symlink_to("best.ckpt")
    state = {"best_model_path": recorded, "best_k_models": {recorded: 0.5}}
    trainer = SimpleNamespace(default_root_dir=str(tmp_path / "run"))
    Run().callback.on_load_checkpoint(trainer, None, {"callbacks": {"best": state}, "loops": LOOPS})
    path = str(folder / expected) if expected else ""
    assert state["best_model_path"] == path
    assert state["best_k_models"] == ({path: 0.5} if path else {})
