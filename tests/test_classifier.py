import copy
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifarnet.classifier import Classifier
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
    fit_loop = SimpleNamespace(_load_combined_loader_states=lambda: None)
    module._trainer = SimpleNamespace(train_dataloader=loader, fit_loop=fit_loop)
    module.on_train_start()
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
