"""Grad-CAM: compared with captum, and with networks whose maps are known."""

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
def test_map_equals_captums(make, layer, images):
    network, classes = make().eval(), torch.tensor([1, 0, 3])
    for parameter in network.parameters():  # some heads are initialised with zeros
        parameter.data += 0.02 * torch.randn_like(parameter)
    expected = LayerGradCam(network, getattr(network, layer)).attribute(
        images.float() / 255, target=classes, relu_attributions=True
    )
    expected = LayerAttribution.interpolate(expected.detach(), (32, 32), "bilinear")[:, 0]
    heat = grad_cam(network, images, classes)
    is_supported = expected.amax((1, 2)) > 0  # some images may not support their class
    assert is_supported.sum() >= 2
    torch.testing.assert_close(heat * expected.amax((1, 2), keepdim=True), expected, rtol=1e-4, atol=1e-6)
    assert heat.amax((1, 2)).tolist() == pytest.approx(is_supported.float().tolist())


class Corner(nn.Module):
    """Class 0 depends on red at the upper left only, class 1 on red at the lower right only."""

    def __init__(self):
        super().__init__()
        self.normalize, self.grid = Normalize(), nn.AvgPool2d(8)

    def forward(self, images):
        red = self.grid(self.normalize(images))[:, 0]
        return torch.stack([red[:, 0, 0] ** 2, red[:, 3, 3] ** 2], 1)


def test_map_depends_on_the_class():
    images = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    images[1, :, 24:, 24:] = 0
    heat = grad_cam(Corner().eval(), images, torch.tensor([0, 1]))
    assert heat[0].min() > 0  # a channel has one weight, so every red place supports class 0
    assert not heat[1].any()  # nothing is red at the lower right, and the gradient is zero


@pytest.mark.parametrize("front", ["class token", "none"])
def test_tokens_are_arranged_as_a_grid(front):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.patch = nn.LayerNorm(3, elementwise_affine=False), nn.AvgPool2d(8)

        def forward(self, images):
            tokens = self.patch(images).flatten(2).mT
            if front == "class token":
                tokens = torch.cat([torch.ones(len(tokens), 1, 3), tokens], 1)
            return (self.norm(tokens)[:, -16:] ** 2).sum((1, 2))[:, None]

    images = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)  # equal channels become 0 in the norm
    images[0, 0, 8:16, 16:24] = 255
    heat = grad_cam(Tokens().eval(), images, torch.tensor([0]))
    assert heat[0].argmax().item() in {row * 32 + column for row in range(8, 16) for column in range(16, 24)}
    assert heat[0, 24:].sum() == 0


def test_vit_whose_head_reads_only_the_class_token(images):
    network = ViT(width=24, depth=2, num_heads=2).eval()
    heat = grad_cam(network, images, torch.tensor([1, 2, 3]))
    assert heat.shape == (3, 32, 32)
    assert (heat.amax((1, 2)) > 0).any()


def test_network_is_unchanged(images):
    network = CNN(widths=(4, 4)).eval()
    nn.init.normal_(network.head.weight)
    expected = grad_cam(network, images, torch.tensor([1, 2, 3]))
    assert all(parameter.grad is None for parameter in network.parameters())
    network.requires_grad_(False)
    assert torch.equal(grad_cam(network, images, torch.tensor([1, 2, 3])), expected)
    assert not any(module._forward_hooks for module in network.modules())


def test_network_without_feature_maps(images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    assert not grad_cam(network, images, torch.tensor([1, 2, 3])).any()
