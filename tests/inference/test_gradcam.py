"""Where a network looked: as captum computes it, and as a network made by hand shows."""

import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import nn

from cifarnet.inference.gradcam import grad_cam
from cifarnet.models import CNN, Normalize
from cifarnet.models.resnet import CifarResNet
from cifarnet.models.vit import ViT


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("make", "layer"), [(lambda: CNN(widths=(8, 8, 8, 8)), "features"), (CifarResNet, "layers")])
def test_as_captum_computes_it(make, layer, images):
    network, classes = make().eval(), torch.tensor([1, 0, 3])
    for parameter in network.parameters():  # a head of zeros, as some begin, would look nowhere
        parameter.data += 0.02 * torch.randn_like(parameter)
    expected = LayerGradCam(network, getattr(network, layer)).attribute(
        images.float() / 255, target=classes, relu_attributions=True
    )
    expected = LayerAttribution.interpolate(expected.detach(), (32, 32), "bilinear")[:, 0]
    heat = grad_cam(network, images, classes)
    told = expected.amax((1, 2)) > 0  # nothing may speak for a class
    assert told.sum() >= 2
    torch.testing.assert_close(heat * expected.amax((1, 2), keepdim=True), expected, rtol=1e-4, atol=1e-6)
    assert heat.amax((1, 2)).tolist() == pytest.approx(told.float().tolist())


class Corner(nn.Module):
    """Looks for red at the upper left (class 0) or the lower right (class 1) alone."""

    def __init__(self):
        super().__init__()
        self.normalize, self.grid = Normalize(), nn.AvgPool2d(8)

    def forward(self, images):
        red = self.grid(self.normalize(images))[:, 0]
        return torch.stack([red[:, 0, 0] ** 2, red[:, 3, 3] ** 2], 1)


def test_the_class_that_is_asked_for_is_looked_at():
    images = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    images[1, :, 24:, 24:] = 0
    heat = grad_cam(Corner().eval(), images, torch.tensor([0, 1]))
    assert heat[0].min() > 0  # one weight a channel, for every place: where it is red, it speaks for class 0
    assert not heat[1].any()  # nothing red there, and nothing that would change it


@pytest.mark.parametrize("in_front", ["class token", "none"])
def test_tokens_are_laid_out_as_the_grid_they_come_from(in_front):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.patch = nn.LayerNorm(3, elementwise_affine=False), nn.AvgPool2d(8)

        def forward(self, images):
            tokens = self.patch(images).flatten(2).mT
            if in_front == "class token":
                tokens = torch.cat([torch.ones(len(tokens), 1, 3), tokens], 1)
            return (self.norm(tokens)[:, -16:] ** 2).sum((1, 2))[:, None]

    images = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)  # equal channels are 0 after the norm
    images[0, 0, 8:16, 16:24] = 255
    heat = grad_cam(Tokens().eval(), images, torch.tensor([0]))
    assert heat[0].argmax().item() in {row * 32 + column for row in range(8, 16) for column in range(16, 24)}
    assert heat[0, 24:].sum() == 0


def test_a_vit_that_reads_its_class_token_alone(images):
    network = ViT(width=24, depth=2, num_heads=2).eval()
    heat = grad_cam(network, images, torch.tensor([1, 2, 3]))
    assert heat.shape == (3, 32, 32)
    assert (heat.amax((1, 2)) > 0).any()


def test_it_changes_nothing(images):
    network = CNN(widths=(4, 4)).eval()
    nn.init.normal_(network.head.weight)
    expected = grad_cam(network, images, torch.tensor([1, 2, 3]))
    assert all(parameter.grad is None for parameter in network.parameters())
    network.requires_grad_(False)
    assert torch.equal(grad_cam(network, images, torch.tensor([1, 2, 3])), expected)
    assert not any(module._forward_hooks for module in network.modules())


def test_a_network_without_places(images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    assert not grad_cam(network, images, torch.tensor([1, 2, 3])).any()
