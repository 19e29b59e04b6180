import copy
from functools import partial

import pytest
import torch

from cifarnet.models import CNN
from cifarnet.module import Classifier

DECAY = 0.03


def small_classifier(weight_decay: float) -> Classifier:
    torch.manual_seed(0)
    network = CNN(image_size=8, widths=(4, 4), hidden=8).double()
    for parameter in network.parameters():  # biases start at zero, where they would not be decayed
        torch.nn.init.normal_(parameter, std=0.3)
    return Classifier(network, partial(torch.optim.SGD, lr=0.1, weight_decay=weight_decay), label_smoothing=0.1)


def test_decay_in_the_optimizer_minimises_the_explicit_objective():
    images, labels = torch.rand(16, 3, 8, 8, dtype=torch.double), torch.randint(0, 10, (16,))
    decayed, plain = small_classifier(DECAY), small_classifier(0.0)
    before = copy.deepcopy(dict(decayed.named_parameters()))

    decayed.training_step((images, labels), 0).backward()
    decayed.optimizer.step()

    cross_entropy = plain.training_step((images, labels), 0)
    penalty = sum(parameter.square().sum() for parameter in plain.network.parameters())
    (cross_entropy + DECAY / 2 * penalty).backward()
    plain.optimizer.step()

    for (name, one), other in zip(decayed.named_parameters(), plain.parameters(), strict=True):
        # 1e-7: logits are float32
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
        assert not torch.equal(one, before[name]), f"{name} was not learned"


def test_loss_returns_both_terms_and_their_sum():
    module = small_classifier(DECAY)
    logits, labels = torch.randn(6, 10), torch.randint(0, 10, (6,))
    loss = module.loss(logits, labels)
    target = torch.full((6, 10), 0.1 / 10).scatter(1, labels[:, None], 0.9 + 0.1 / 10)
    torch.testing.assert_close(loss.cross_entropy, -(target * logits.log_softmax(1)).sum(1).mean())
    squares = sum(float(parameter.detach().square().sum()) for parameter in module.network.parameters())
    cross_entropy, decay, objective = (term.item() for term in loss)
    assert decay == pytest.approx(DECAY / 2 * squares)
    assert objective == pytest.approx(cross_entropy + decay)


def test_epoch_means_weigh_every_image_the_same():
    module = small_classifier(0.0)
    images, labels = torch.rand(10, 3, 8, 8, dtype=torch.double), torch.randint(0, 10, (10,))
    for part in (slice(0, 7), slice(7, 10)):  # batches of unequal size
        module.validation_step((images[part], labels[part]), 0)
    logits = module(images)
    means = module.means("val")
    assert means["val/accuracy"] == (logits.argmax(1) == labels).sum().item() / 10
    torch.testing.assert_close(means["val/cross_entropy"], torch.nn.functional.cross_entropy(logits, labels).item())
