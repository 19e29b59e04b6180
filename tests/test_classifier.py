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
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from cifarnet.classifier import Classifier
from cifarnet.data.loader import Batch
from cifarnet.errors import UserError
from cifarnet.models import CNN
from cifarnet.recipes.focal import FocalLoss
from cifarnet.seeding import generator

DECAY = 0.03
ENDLESS = {"train_dataloader": [], "num_training_batches": 5, "max_epochs": -1, "max_steps": -1}  # of a trainer
ENDLESS |= {"callbacks": [], "accumulate_grad_batches": 1}


def small_classifier(weight_decay: float, smoothing: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    network = CNN(image_size=8, widths=(4, 4), hidden=8).double()
    for parameter in network.parameters():  # biases start at zero, where they would not be decayed
        nn.init.normal_(parameter, std=0.3)
    objective = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")
    module = Classifier(network, partial(torch.optim.SGD, lr=0.1, weight_decay=weight_decay), objective=objective)
    module._trainer = SimpleNamespace(**ENDLESS)
    module._trainer.optimizers = [module.configure_optimizers()["optimizer"]]
    return module


def linear_classifier(**settings) -> Classifier:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10).double())
    return Classifier(network, **{"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings)


def quiet_trainer(**settings) -> L.Trainer:
    """Return a trainer that writes and prints nothing."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "num_sanity_val_steps": 0} | settings
    return L.Trainer(**settings)


def part(batch: Batch, place: slice | Tensor) -> Batch:
    return Batch(*(member[place] for member in batch[:3]))


def unequal_batches(batch: Batch) -> DataLoader:
    """Return a loader of two batches, of 11 images and of up to 5."""
    parts = [part(batch, slice(0, 11)), part(batch, slice(11, 16))]
    return DataLoader([batch for batch in parts if len(batch.labels)], batch_size=None)


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    images = torch.rand(16, 3, 8, 8, dtype=torch.double, generator=random)
    return Batch(images, torch.randint(0, 10, (16,), generator=random), torch.arange(16))


def test_decay_in_the_optimizer_minimises_the_explicit_objective(batch):
    decayed, plain = small_classifier(DECAY), small_classifier(0.0)
    before = copy.deepcopy(dict(decayed.named_parameters()))

    decayed.training_step(batch, 0)["loss"].backward()
    decayed.trainer.optimizers[0].step()

    cross_entropy = plain.training_step(batch, 0)["loss"]
    penalty = sum(parameter.square().sum() for parameter in plain.network.parameters())
    (cross_entropy + DECAY / 2 * penalty).backward()
    plain.trainer.optimizers[0].step()

    for (name, one), other in zip(decayed.named_parameters(), plain.parameters(), strict=True):
        # 1e-7: logits are float32
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
        assert not torch.equal(one, before[name]), f"{name} is unchanged"


def test_training_metrics_are_both_terms_and_their_sum(batch):
    module = small_classifier(DECAY, smoothing=0.1)
    module.training_step(batch, 0)
    logits, labels = module(batch.images), batch.labels
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


def test_epoch_means_weight_all_images_equally(batch):
    module = small_classifier(0.0)
    for unequal in (slice(0, 11), slice(11, 16)):
        module.validation_step(part(batch, unequal), 0)
    logits = module(batch.images)
    means = module.means("val")
    assert means["val/accuracy"] == (logits.argmax(1) == batch.labels).sum().item() / 16
    torch.testing.assert_close(means["val/cross_entropy"], F.cross_entropy(logits, batch.labels).item())


@pytest.mark.parametrize("objective", [nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none"), FocalLoss(2.0)])
def test_validation_and_test_record_the_plain_cross_entropy_of_any_objective(batch, objective):
    module = linear_classifier(objective=objective)
    nn.init.normal_(module.network[1].weight, std=0.2)
    trainer = quiet_trainer(max_epochs=1)
    trainer.validate(module, unequal_batches(batch), verbose=False)
    trainer.test(module, unequal_batches(batch), verbose=False)
    logits = module(batch.images)
    plain = -logits.log_softmax(1).gather(1, batch.labels[:, None]).mean().item()
    assert objective(logits, batch.labels).mean().item() != pytest.approx(plain, rel=0.01)
    for stage in ("val", "test", "one_view"):
        assert module.means(stage)[f"{stage}/cross_entropy"] == pytest.approx(plain, rel=1e-5)


def test_the_logged_decay_uses_the_decay_of_each_group(batch):
    module = linear_classifier(optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=DECAY), no_decay=True)
    nn.init.normal_(module.network[1].bias)
    quiet_trainer(max_epochs=1).fit(module, unequal_batches(batch))
    weight, bias = (parameter.detach().square().sum().item() for parameter in module.network.parameters())
    assert bias > 0.1
    assert module.training_metrics()["train/weight_decay"] == pytest.approx(DECAY / 2 * weight)


def test_the_loss_of_a_mixed_image_includes_both_labels(batch):
    module = small_classifier(0.0)
    partners, lam = batch.labels.roll(1), torch.linspace(0, 1, 16)
    step = module.training_step(batch._replace(partners=partners, lam=lam), 0)
    logits = module(batch.images)
    first, second = (F.cross_entropy(logits, labels, reduction="none") for labels in (batch.labels, partners))
    expected = lam * first + (1 - lam) * second
    torch.testing.assert_close(step["losses"], expected.detach())
    torch.testing.assert_close(step["loss"], expected.mean())


def test_a_step_returns_the_loss_of_each_image_without_its_graph(batch):
    module = small_classifier(0.0)
    losses = module.training_step(batch, 0)["losses"]
    assert not losses.requires_grad
    torch.testing.assert_close(losses, F.cross_entropy(module(batch.images), batch.labels, reduction="none").detach())


def test_the_sums_are_not_buffers():
    """EMA and DDP would change them."""
    module = small_classifier(0.0)
    assert {name for name, _ in module.named_buffers()} == {"network.normalize.mean", "network.normalize.std"}


def test_random_draws_of_an_epoch_are_a_function_of_seed_and_epoch():
    def drawn(seed: int, epoch: int) -> float:
        module = Classifier(nn.Linear(1, 1), partial(torch.optim.SGD, lr=0.1), seed=seed)
        module._trainer = SimpleNamespace(current_epoch=epoch)
        module.on_train_epoch_start()
        return torch.rand(()).item()

    expected = {place: torch.rand((), generator=generator(*place, "torch")).item() for place in product((0, 1), (0, 1))}
    assert {place: drawn(*place) for place in expected} == expected
    assert len(set(expected.values())) == 4


class RecordingLogger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, *arguments, **keywords):
        self.logged += [*arguments, *keywords.values()]

    log_hyperparams = log_metrics


def metrics(stage, logits, labels):
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {f"{stage}/cross_entropy": F.cross_entropy(logits, labels).item(), f"{stage}/accuracy": accuracy}


def test_the_trainer_receives_the_metrics_of_the_last_epoch(batch):
    logger, seen = RecordingLogger(), []
    module = linear_classifier(
        optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=DECAY),
        **{"hparams": {"plain": "data"}, "tta": "mirror", "tta_share": 0.5},
    )
    handle = module.network.register_forward_hook(lambda *call: seen.append(call[-1].detach().float()))
    trainer = quiet_trainer(max_epochs=2, logger=logger)
    trainer.fit(module, unequal_batches(batch), unequal_batches(batch))
    handle.remove()
    train, val = (torch.cat(seen[first : first + 2]) for first in (4, 6))  # of the second epoch
    expected = metrics("train", train, batch.labels) | metrics("val", val, batch.labels)
    decay = DECAY / 2 * sum(weight.detach().square().sum().item() for weight in module.network.parameters())
    expected |= {"train/weight_decay": decay, "train/objective": expected["train/cross_entropy"] + decay}
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == pytest.approx(expected)

    assert logger.logged == []  # History writes

    trainer.test(module, unequal_batches(part(batch, slice(3))), verbose=False)
    logger.logged.clear()
    shuffled = part(batch, torch.randperm(16, generator=torch.Generator().manual_seed(0)))
    [tested] = trainer.test(module, unequal_batches(shuffled), verbose=False)
    with torch.no_grad():
        one_view, mirrored = module(shuffled.images), module(shuffled.images.flip(3))
    least_confident = one_view.softmax(1).amax(1).argsort()[:8]
    final = one_view.index_copy(0, least_confident, (one_view + mirrored)[least_confident] / 2)
    torch.testing.assert_close(module.test_logits, final)
    assert torch.equal(module.test_index, shuffled.index)
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == pytest.approx(
        metrics("test", final, shuffled.labels)
    )
    assert module.means("one_view") == pytest.approx(metrics("one_view", one_view, shuffled.labels))
    assert logger.logged[0] == pytest.approx(tested | {"epoch": 2})
    assert module.hparams == {"plain": "data"}


@pytest.mark.parametrize("stage", ["train", "val", "test", "one_view"])
def test_the_means_of_no_images_are_nan(stage):
    assert all(map(math.isnan, linear_classifier().means(stage).values()))


def test_defaults():
    module = linear_classifier()
    assert (module.memory_format, module.seed, module.tta) == (torch.channels_last, 0, "none")
    assert module.test_logits is module.test_index is None
    assert linear_classifier(tta="mirror").tta_share == 1


@pytest.mark.parametrize("channels_last", [True, False])
def test_network_and_images_have_the_memory_format(batch, channels_last):
    seen, network = [], nn.Sequential(nn.Conv2d(3, 4, 3).double(), nn.Flatten())
    network.register_forward_pre_hook(lambda _, images: seen.append(*images))
    module = Classifier(network, partial(torch.optim.SGD, lr=0.1), channels_last=channels_last)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module(batch.images.contiguous(memory_format=memory_format))
    for tensor in (network[0].weight, *seen):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_schedule_gets_the_number_of_steps_and_is_stepped_after_each(batch):
    planned = []

    def schedule(optimizer, steps):
        planned.append(steps)
        return LambdaLR(optimizer, lambda step: 0.5**step)

    module = linear_classifier(scheduler=schedule)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, unequal_batches(batch))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**4
    assert module.total_steps == 4
    module._trainer = SimpleNamespace(**ENDLESS)
    module.configure_optimizers()
    assert planned == [4, 0]  # 0: the run has no end
    assert module.total_steps == math.inf


def test_a_schedule_that_fails_is_reported_with_its_step(batch):
    module = linear_classifier(scheduler=lambda optimizer, _: LambdaLR(optimizer, lambda step: 1 / (3 - step)))
    with pytest.raises(UserError, match=r"^scheduler: step 3 .*division by zero\. Change its settings"):
        quiet_trainer(max_epochs=2).fit(module, unequal_batches(batch))


@pytest.mark.parametrize(("clip", "algorithm"), [(None, None), (0, None), (0.001, None), (0.001, "value")])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_clipped(batch, clip, algorithm, precision, fused):
    """With a learning rate of 1, the step is the clipped gradient."""
    settings = {"precision": precision}
    if precision == "16-mixed":  # as on a GPU
        settings = {"plugins": MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))}
    trainer = quiet_trainer(max_epochs=1, gradient_clip_val=clip, gradient_clip_algorithm=algorithm, **settings)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    module = Classifier(network, partial(torch.optim.SGD, lr=1.0, fused=fused))
    before = nn.utils.parameters_to_vector(network.parameters()).detach()
    one_batch = DataLoader([batch._replace(images=batch.images.float())], batch_size=None)
    if clip and fused and precision == "16-mixed":
        with pytest.raises(UserError, match=r"^trainer\.gradient_clip_val .*float16.* optimizer\.fused=false"):
            trainer.fit(module, one_batch)
        return
    trainer.fit(module, one_batch)
    step = nn.utils.parameters_to_vector(network.parameters()).detach() - before
    length = (step.abs().amax() if algorithm == "value" else step.norm()).item()
    assert length == pytest.approx(clip, rel=0.01) if clip else length > 0.01


def test_sums_are_on_the_device(monkeypatch):
    monkeypatch.setattr(Classifier, "device", torch.device("meta"))
    module = linear_classifier()
    module.on_validation_epoch_start()
    assert module.sums["val"].device.type == "meta"
