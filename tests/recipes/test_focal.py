import pytest
import torch

from cifarnet.build import build
from cifarnet.config import validate
from cifarnet.recipes.focal import FocalLoss


def test_losses_equal_those_by_hand():
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0]]).log_softmax(1)
    labels = torch.tensor([0, 1])
    known = [0.5, 1 / (1 + torch.tensor(3.0).exp().item())]
    expected = [(1 - p) ** 2 * -torch.tensor(p).log().item() for p in known]
    assert FocalLoss()(logits, labels).tolist() == pytest.approx(expected, rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(FocalLoss(0, 0.1)(logits, labels), plain)
    certain = torch.tensor([[200.0, 0.0]], requires_grad=True)
    FocalLoss(0.5)(certain, torch.tensor([0])).sum().backward()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("choice", ["objective=focal", "scheduler=warmup_cosine", "scheduler=step"])
def test_choices_can_be_swapped_in_the_baseline(config, choice):
    made = config("+experiment=baseline", "data=synthetic", choice, without="data")
    validate(made)
    if choice.startswith("objective"):
        objective = build(made).classifier.objective
        assert (objective.gamma, objective.label_smoothing) == (2, 0.1)
