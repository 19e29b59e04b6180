"""The features of images: the inputs of a network's last layer."""

import numpy as np
import pytest
import torch
from torch import nn

import cifarnet
from cifarnet.data.loader import Batch
from cifarnet.errors import UserError
from cifarnet.inference.predictor import Predictor
from cifarnet.models import CNN
from cifarnet.recipes.backbone import head_inputs
from conftest import picture

IMAGES = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_head_turns_the_features_into_the_logits(run):
    classifier = cifarnet.load(run)
    features = classifier.features(IMAGES, batch_size=4)
    assert (features.dtype, features.ndim, features.requires_grad) == (torch.float32, 2, False)
    nn.Linear(features.shape[1], 1)(features).sum().backward()  # tensors of inference mode cannot train a layer
    with torch.no_grad():
        torch.testing.assert_close(classifier.network.head(features), classifier.network(IMAGES), atol=1e-4, rtol=1e-4)
        head = classifier.network.head
        assert not head._forward_pre_hooks
    torch.testing.assert_close(classifier.features(IMAGES / 255), features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(classifier.features(IMAGES[3])[0], features[3], atol=1e-4, rtol=1e-4)


def test_features_of_files(run, tmp_path):
    classifier = cifarnet.load(run)
    for number in range(3):
        picture(tmp_path / f"{number}.png", (80 * number, 50, 100), (40, 60))
    pixels = np.stack([answer.pixels for answer in classifier.answers(tmp_path)])
    found = classifier.features(tmp_path)
    torch.testing.assert_close(found, classifier.features(list(pixels)))
    assert len(found) == 3
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        classifier.features(tmp_path)
    (tmp_path / "empty").mkdir()
    assert len(classifier.features(tmp_path / "empty")) == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_embedding_ignores_test_time_augmentation(precision):
    network = CNN(num_classes=3, image_size=32, widths=[4, 4], hidden=8).eval()
    nn.init.normal_(network.head.weight)
    order = torch.tensor([3, 9, 0, 1, 2, 4, 5, 6, 7, 8])
    batches = [Batch(IMAGES[index], index % 3, index) for index in order.split(4)]
    predictor = Predictor(network, tta="mirror", precision=precision, accelerator="cpu")
    predictions = predictor.embed(batches, "test")
    assert torch.equal(predictions.index, order)
    assert torch.equal(predictions.logits, predictions.one_view)
    torch.testing.assert_close(predictions.logits, predictor.predict_all(batches, "test").one_view)
    assert predictor.tta == "mirror"
    assert predictions.features.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(network.head(predictions.features), predictions.logits, atol=0.05, rtol=0.05)


class Token(nn.Module):
    """A network whose head gets the first of many tokens, a view of all of them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 2)

    def forward(self, images):
        return self.head(images[:, 0, 0])


def test_only_the_features_are_kept_in_memory():
    network = Token()
    with torch.inference_mode(), head_inputs(network) as inputs:
        network(torch.rand(6, 3, 32, 32))
    assert inputs[0].untyped_storage().nbytes() == 6 * 32 * 4


def test_the_head_may_be_a_convolution():
    network = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.ReLU(), nn.Conv2d(5, 2, 4), nn.Flatten())
    images = torch.rand(6, 3, 32, 32)
    with torch.no_grad(), head_inputs(network) as inputs:
        logits = network(images)
    (features,) = inputs
    assert features.shape == (6, 5 * 4 * 4)
    with torch.no_grad():
        torch.testing.assert_close(features @ network[2].weight.flatten(1).T + network[2].bias, logits)
