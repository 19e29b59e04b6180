import copy
import math
from functools import partial
from itertools import product
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from cifarnet import __version__
from cifarnet.classifier import Classifier
from cifarnet.errors import UserError
from cifarnet.models import CNN
from cifarnet.seeding import generator

DECAY = 0.03


def small_classifier(weight_decay: float, smoothing: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    network = CNN(image_size=8, widths=(4, 4), hidden=8).double()
    for parameter in network.parameters():  # biases start at zero, where they would not be decayed
        nn.init.normal_(parameter, std=0.3)
    objective = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")
    module = Classifier(network, partial(torch.optim.SGD, lr=0.1, weight_decay=weight_decay), objective=objective)
    module.optimizer = module.configure_optimizers()["optimizer"]  # as a trainer would
    module.optimizers = lambda **_: module.optimizer
    return module


def linear_classifier(**settings) -> Classifier:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10).double())
    return Classifier(network, **{"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings)


def quiet_trainer(**settings) -> L.Trainer:
    """Nothing is written or printed."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "num_sanity_val_steps": 0} | settings
    return L.Trainer(**settings)


def start(module: Classifier, loader=None) -> None:
    """As a trainer would."""
    fit_loop = SimpleNamespace(_combined_loader_states_to_load=[])
    module._trainer = SimpleNamespace(train_dataloader=loader, fit_loop=fit_loop, estimated_stepping_batches=1)
    module.on_train_start()


def unequal_batches(images, labels, index) -> DataLoader:
    """Of 11 images and of 5."""
    parts = zip(*(whole.split(11) for whole in (images, labels, index)), strict=True)
    return DataLoader(list(parts), batch_size=None)


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    images = torch.rand(16, 3, 8, 8, dtype=torch.double, generator=random)
    return images, torch.randint(0, 10, (16,), generator=random), torch.arange(16)


def test_decay_in_the_optimizer_minimises_the_explicit_objective(batch):
    decayed, plain = small_classifier(DECAY), small_classifier(0.0)
    before = copy.deepcopy(dict(decayed.named_parameters()))

    decayed.training_step(batch, 0).backward()
    decayed.optimizer.step()

    cross_entropy = plain.training_step(batch, 0)
    penalty = sum(parameter.square().sum() for parameter in plain.network.parameters())
    (cross_entropy + DECAY / 2 * penalty).backward()
    plain.optimizer.step()

    for (name, one), other in zip(decayed.named_parameters(), plain.parameters(), strict=True):
        # 1e-7: logits are float32
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
        assert not torch.equal(one, before[name]), f"{name} was not learned"


def test_training_metrics_are_both_terms_and_their_sum(batch):
    module = small_classifier(DECAY, smoothing=0.1)
    module.training_step(batch, 0)
    logits, labels = module(batch[0]), batch[1]
    target = torch.full((16, 10), 0.1 / 10).scatter(1, labels[:, None], 0.9 + 0.1 / 10)
    cross_entropy = -(target * logits.log_softmax(1)).sum(1).mean().item()
    squares = sum(float(parameter.detach().square().sum()) for parameter in module.network.parameters())
    assert module.training_metrics() == pytest.approx(
        {
            "train/cross_entropy": cross_entropy,
            "train/accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "train/weight_decay": DECAY / 2 * squares,
            "train/objective": cross_entropy + DECAY / 2 * squares,
        }
    )


def test_epoch_means_weigh_every_image_the_same(batch):
    module = small_classifier(0.0)
    images, labels, _ = batch
    for part in (slice(0, 11), slice(11, 16)):  # batches of unequal size
        module.validation_step((images[part], labels[part]), 0)
    logits = module(images)
    means = module.means("val")
    assert means["val/accuracy"] == (logits.argmax(1) == labels).sum().item() / 16
    torch.testing.assert_close(means["val/cross_entropy"], F.cross_entropy(logits, labels).item())


def test_a_mixed_image_has_the_loss_of_both_its_labels(batch):
    module = small_classifier(0.0)
    images, labels, index = batch
    partners, own = labels.roll(1), torch.linspace(0, 1, 16)
    loss = module.training_step((images, labels, index, partners, own), 0)
    logits = module(images)
    both = [F.cross_entropy(logits, of, reduction="none") for of in (labels, partners)]
    torch.testing.assert_close(loss, (own * both[0] + (1 - own) * both[1]).mean())


def test_losses_are_told_with_the_images_they_are_of(batch):
    module, told = small_classifier(0.0), {}
    loader = SimpleNamespace(
        chooses=True, observe=lambda index, losses: told.update(zip(index.tolist(), losses, strict=True))
    )
    start(module, loader)
    images, labels, index = batch
    order = index.flip(0)
    module.training_step((images[order], labels[order], order), 0)
    expected = F.cross_entropy(module(images), labels, reduction="none")
    torch.testing.assert_close(torch.stack([told[i] for i in range(16)]), expected)


def test_no_sum_is_a_buffer():
    """Averaging weights would change it, and so would DDP."""
    module = small_classifier(0.0)
    assert {name for name, _ in module.named_buffers()} == {"network.normalize.mean", "network.normalize.std"}


def test_what_torch_draws_in_an_epoch_is_a_function_of_seed_and_epoch():
    def drawn(seed: int, epoch: int) -> float:
        module = Classifier(nn.Linear(1, 1), partial(torch.optim.SGD, lr=0.1), seed=seed)
        module._trainer = SimpleNamespace(current_epoch=epoch)
        module.on_train_epoch_start()
        return torch.rand(()).item()

    expected = {place: torch.rand((), generator=generator(*place, "torch")).item() for place in product((0, 1), (0, 1))}
    assert {place: drawn(*place) for place in expected} == expected
    assert len(set(expected.values())) == 4


class Told(DummyLogger):
    def __init__(self):
        super().__init__()
        self.told = []

    def log_metrics(self, *told, **by_name):
        self.told += [*told, *by_name.values()]

    log_hyperparams = log_metrics


def measured(stage, logits, labels):
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {f"{stage}/cross_entropy": F.cross_entropy(logits, labels).item(), f"{stage}/accuracy": accuracy}


def test_a_trainer_is_told_the_last_epochs_means(batch):
    labels, logger, seen = batch[1], Told(), []
    module = linear_classifier(
        optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=DECAY),
        **{"hparams": {"learned": "here"}, "tta": "mirror", "tta_share": 0.5},
    )
    handle = module.network.register_forward_hook(lambda *call: seen.append(call[-1].detach().float()))
    trainer = quiet_trainer(max_epochs=2, logger=logger)
    trainer.fit(module, unequal_batches(*batch), unequal_batches(*batch))
    handle.remove()
    train, val = (torch.cat(seen[start : start + 2]) for start in (4, 6))  # of the second epoch
    expected = measured("train", train, labels) | measured("val", val, labels)
    decay = DECAY / 2 * sum(weight.detach().square().sum().item() for weight in module.network.parameters())
    expected |= {"train/weight_decay": decay, "train/objective": expected["train/cross_entropy"] + decay}
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == pytest.approx(expected)

    trainer.test(module, unequal_batches(*(whole[:3] for whole in batch)), verbose=False)
    trainer.test(module, unequal_batches(*batch), verbose=False)
    with torch.no_grad():
        one_view, mirrored = module(batch[0]), module(batch[0].flip(3))
    unsure = one_view.softmax(1).amax(1).argsort()[:8]
    final = one_view.index_copy(0, unsure, (one_view + mirrored)[unsure] / 2)
    torch.testing.assert_close(module.tested, final)
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == pytest.approx(
        measured("test", final, labels)
    )
    assert module.means("one_view") == pytest.approx(measured("one_view", one_view, labels))
    assert logger.told == []  # History writes
    assert module.hparams == {"learned": "here"}


@pytest.mark.parametrize("stage", ["train", "val", "test", "one_view"])
def test_where_nothing_was_counted_there_is_no_mean(stage):
    assert all(map(math.isnan, linear_classifier().means(stage).values()))


def test_usual_settings():
    module = linear_classifier()
    assert (module.memory_format, module.seed, module.tta, module.tested) == (torch.channels_last, 0, "none", None)
    assert linear_classifier(tta="mirror").tta_share == 1


@pytest.mark.parametrize("channels_last", [True, False])
def test_network_and_images_have_the_memory_format(batch, channels_last):
    seen, network = [], nn.Sequential(nn.Conv2d(3, 4, 3).double(), nn.Flatten())
    network.register_forward_pre_hook(lambda _, images: seen.append(*images))
    module = Classifier(network, partial(torch.optim.SGD, lr=0.1), channels_last=channels_last)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module(batch[0].contiguous(memory_format=memory_format))
    for tensor in (network[0].weight, *seen):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_schedule_knows_the_runs_steps_and_takes_each(batch):
    told = []

    def schedule(optimizer, steps):
        told.append(steps)
        return LambdaLR(optimizer, lambda step: 0.5**step)

    module = linear_classifier(scheduler=schedule)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, unequal_batches(*batch))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**4
    module._trainer = SimpleNamespace(estimated_stepping_batches=math.inf)
    module.configure_optimizers()
    assert told == [4, 0]  # of a run without end: 0


def test_a_schedule_that_breaks_off_is_told_with_its_step(batch):
    module = linear_classifier(scheduler=lambda optimizer, _: LambdaLR(optimizer, lambda step: 1 / (3 - step)))
    with pytest.raises(UserError, match=r"^scheduler, in step 3: division by zero\. Choose"):
        quiet_trainer(max_epochs=2).fit(module, unequal_batches(*batch))


@pytest.mark.parametrize(("clip", "algorithm"), [(None, None), (0, None), (0.001, None), (0.001, "value")])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_no_longer_than_asked_for(batch, clip, algorithm, precision, fused):
    """With a rate of 1 and nothing else, the step is the clipped gradient."""
    images, labels, index = batch
    settings = {"precision": precision}
    if precision == "16-mixed":  # as on a GPU
        settings = {"plugins": MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))}
    trainer = quiet_trainer(max_epochs=1, gradient_clip_val=clip, gradient_clip_algorithm=algorithm, **settings)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    module = Classifier(network, partial(torch.optim.SGD, lr=1.0, fused=fused))
    before = nn.utils.parameters_to_vector(network.parameters()).detach()
    one_batch = DataLoader([(images.float(), labels, index)], batch_size=None)
    if clip and fused and precision == "16-mixed":
        with pytest.raises(UserError, match=r"^trainer\.gradient_clip_val in float16 needs optimizer\.fused=false\.$"):
            trainer.fit(module, one_batch)
        return
    trainer.fit(module, one_batch)
    step = nn.utils.parameters_to_vector(network.parameters()).detach() - before
    length = (step.abs().amax() if algorithm == "value" else step.norm()).item()
    assert length == pytest.approx(clip, rel=0.01) if clip else length > 0.01


def saved(module: Classifier) -> dict:
    checkpoint = {"hyper_parameters": {"cifarnet": __version__}}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.parametrize("more", [{}, {"cuda": torch.zeros(16, dtype=torch.uint8)}], ids=["", "on a GPU before"])
def test_sums_and_draws_go_on_in_the_middle_of_an_epoch(batch, more, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)  # nobody asks for it on a CPU
    whole, resumed = small_classifier(DECAY), small_classifier(DECAY)
    whole.training_step([member[:11] for member in batch], 0)
    checkpoint = copy.deepcopy(saved(whole))
    checkpoint["middle_of_epoch"]["rng"] |= more
    expected, drawn = torch.rand(2).tolist(), []
    resumed.on_load_checkpoint(checkpoint)
    for _ in range(2):
        start(resumed)
        drawn.append(torch.rand(()).item())
    assert drawn == expected  # restored once, not at a second start
    for module in (whole, resumed):
        module.training_step([member[11:] for member in batch], 1)
    assert whole.training_metrics() == resumed.training_metrics()


def test_sums_lie_on_the_device(monkeypatch):
    monkeypatch.setattr(Classifier, "device", torch.device("meta"))
    module = linear_classifier()
    module.on_validation_epoch_start()
    assert module._sums["val"].device.type == "meta"


def test_draws_on_a_gpu_go_on(monkeypatch):
    """Of a GPU that need not be there."""
    device, state, restored = torch.device("cuda", 1), torch.arange(16, dtype=torch.uint8), {}
    monkeypatch.setattr(Classifier, "device", device)
    monkeypatch.setattr(torch.cuda, "get_rng_state", {device: state}.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, of: restored.update({of: state}))
    module = linear_classifier()
    module.on_load_checkpoint(saved(module))
    module._sums["train"] = SimpleNamespace(to={device: "moved"}.__getitem__)
    start(module)
    assert module._sums["train"] == "moved"
    assert list(restored) == [device]
    assert torch.equal(restored[device], state)
