import pytest
import torch
from torch import nn

from cifarnet.models import CNN, Normalize, SpeedNet
from cifarnet.models.speednet import Whiten


def test_baseline_network_is_the_one_described():
    network = CNN()
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_168_362
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [32, 32, 64, 64]
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


def test_arguments_change_the_network():
    network = CNN(num_classes=3, image_size=20, in_chans=1, widths=(4, 4, 8, 8, 8, 8), hidden=7, drop_rate=0.5)
    assert network(torch.rand(5, 1, 20, 20)).shape == (5, 3)
    assert any(isinstance(layer, nn.Dropout) and layer.p == 0.5 for layer in network.modules())


@pytest.mark.parametrize("arguments", [dict(widths=(4, 4, 8)), dict(image_size=3)])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"widths|image_size"):
        CNN(**arguments)


def test_normalize_standardises_the_images_it_was_fitted_to():
    images = torch.randint(0, 200, (50, 3, 8, 8), dtype=torch.uint8)
    images[:, 2] //= 3
    layer = Normalize()
    scaled = images.double() / 255
    layer.fit(scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0))
    normalised = layer(images)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised, layer(images.float() / 255))
    assert set(layer.state_dict()) == {"mean", "std"}  # saved with the network


def test_normalize_survives_a_constant_channel():
    layer = Normalize()
    layer.fit(torch.full((3,), 7 / 255), torch.zeros(3))
    assert layer(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)).abs().max() < 1e-6


def test_whitening_makes_the_second_moment_of_patches_the_identity():
    images = torch.rand(400, 3, 10, 10, generator=torch.Generator().manual_seed(0)).cumsum(3)  # pixels go together
    whiten = Whiten(kernel_size=2, eps=0.0)
    whiten.fit(images)
    patches = whiten(images)[:, :12].permute(0, 2, 3, 1).reshape(-1, 12)
    torch.testing.assert_close(patches.T @ patches / len(patches), torch.eye(12), atol=1e-3, rtol=0)
    assert torch.equal(whiten.filters[:12], -whiten.filters[12:])


def test_speednet_begins_as_a_network_that_passes_its_input_on():
    block = SpeedNet().blocks[0]
    images = torch.rand(2, 24, 9, 9)
    torch.testing.assert_close(block.conv1(images)[:, :24], images)


@pytest.mark.parametrize("size", [16, 20, 32, 64])
def test_speednet_takes_images_of_any_size(size):
    network = SpeedNet(num_classes=7)
    assert network(torch.zeros(2, 3, size, size, dtype=torch.uint8)).shape == (2, 7)
    assert sum(parameter.numel() for parameter in SpeedNet().parameters()) == 1_971_328
