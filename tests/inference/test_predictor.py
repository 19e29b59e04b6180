import pytest
import torch
from torch import nn

from cifarnet.data.loader import Batch
from cifarnet.errors import UserError
from cifarnet.inference.predictor import Predictor
from cifarnet.models import CNN


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


def test_predictions_belong_to_their_images(images):
    labels, order = torch.arange(10) % 2, torch.tensor([3, 9, 0, 1, 2, 4, 5, 6, 7, 8])
    batches = [Batch(images[index], labels[index], index) for index in order.split(4)]
    predictions = Predictor(Halves(), accelerator="cpu").predict_all(batches, "test")
    assert torch.equal(predictions.index, order)
    assert torch.equal(predictions.labels, labels[order])
    torch.testing.assert_close(predictions.logits, Halves()(images[order]).detach())
    assert torch.equal(predictions.one_view, predictions.logits)
    assert not predictions.logits.requires_grad


def test_logits_are_averaged_with_those_of_mirror_images(images):
    one_view, logits = Predictor(Halves(), tta="mirror", accelerator="cpu")(images)
    torch.testing.assert_close(one_view, Halves()(images).detach())
    torch.testing.assert_close(logits, one_view.mean(1, keepdim=True).expand(-1, 2))


def test_precision(images):
    class Product(nn.Linear):
        def forward(self, images):
            self.computed = super().forward(images.float().flatten(1))
            return self.computed

    network = Product(3 * 8 * 8, 2)
    logits, _ = Predictor(network, precision="bf16-mixed", accelerator="cpu")(images)
    assert network.computed.dtype == torch.bfloat16
    assert logits.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*precision")  # Lightning's notes on old names
@pytest.mark.parametrize("precision", ["64-true", "32-true", "16-mixed", "bf16-mixed", 64, 32, 16, "64", "bf16"])
def test_precisions_that_work_on_a_cpu(images, precision):
    network = CNN(num_classes=3, image_size=8, widths=[4, 4], hidden=8).eval()
    expected = network(images)
    logits, _ = Predictor(network, precision=precision, accelerator="cpu")(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"tta": "rotate"}, "tta=rotate"),
        ({"tta_share": -1}, "tta_share=-1"),
        ({"precision": "bf8"}, "precision=bf8"),
        ({"precision": "16-true"}, "precision=16-true is not supported.* Choose 16-mixed"),
        ({"precision": "bf16-true"}, "precision=bf16-true is not supported.* Choose bf16-mixed"),
        ({"accelerator": "abacus"}, "accelerator=abacus"),
    ],
)
def test_bad_settings(settings, setting):
    with pytest.raises(UserError, match=setting):
        Predictor(Halves(), **settings)
