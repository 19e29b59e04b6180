import pytest
import torch
from torch import nn

from cifarnet.errors import UserError
from cifarnet.inference.predictor import Predictor


class Halves(nn.Module):
    """Logits: the mean of an image's left half, and of its right half."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255))

    def forward(self, images):
        return torch.stack([half.float().mean((1, 2, 3)) for half in images.chunk(2, dim=3)], dim=1) * self.scale


@pytest.fixture
def images():
    return torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_answers_to_batches_belong_to_their_images(images):
    labels, order = torch.arange(10) % 2, torch.tensor([3, 9, 0, 1, 2, 4, 5, 6, 7, 8])
    batches = [(images[index], labels[index], index, "whatever else") for index in order.split(4)]
    answers = Predictor(Halves(), accelerator="cpu").over(batches, "test")
    assert torch.equal(answers.index, order)
    assert torch.equal(answers.labels, labels[order])
    torch.testing.assert_close(answers.logits, Halves()(images[order]).detach())
    assert torch.equal(answers.one_view, answers.logits)
    assert not answers.logits.requires_grad


def test_mirror_images_are_averaged_in(images):
    one_view, logits = Predictor(Halves(), tta="mirror", accelerator="cpu")(images)
    torch.testing.assert_close(one_view, Halves()(images).detach())
    torch.testing.assert_close(logits, one_view.mean(1, keepdim=True).expand(-1, 2))


def test_precision_is_the_one_asked_for(images):
    class Product(nn.Linear):
        def forward(self, images):
            self.computed = super().forward(images.float().flatten(1))
            return self.computed

    network = Product(3 * 8 * 8, 2)
    logits, _ = Predictor(network, precision="bf16-mixed", accelerator="cpu")(images)
    assert network.computed.dtype == torch.bfloat16
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tta": "rotate"}, "tta=rotate"),
        ({"tta_share": -1}, "tta_share=-1"),
        ({"precision": "bf8"}, "precision=bf8"),
        ({"accelerator": "abacus"}, "accelerator=abacus"),
    ],
)
def test_what_cannot_be_had_is_told(settings, named):
    with pytest.raises(UserError, match=named):
        Predictor(Halves(), **settings)
