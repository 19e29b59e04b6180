import copy

import pytest
import torch
from torch import nn

from cifarnet.config import validate
from cifarnet.errors import UserError
from cifarnet.models import CNN, Normalize, SpeedNet, check_output, construct
from cifarnet.models.convolution import Conv3x3
from cifarnet.models.speednet import Whiten


def test_baseline_network_has_the_documented_layers():
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


def test_an_odd_number_of_widths_is_refused():
    with pytest.raises(ValueError, match=r"widths=\[4, 4, 8\]"):
        CNN(widths=(4, 4, 8))


def test_normalize_standardizes_the_images_it_was_fitted_to():
    images = torch.randint(0, 200, (50, 3, 8, 8), dtype=torch.uint8)
    images[:, 2] //= 3
    layer = Normalize()
    scaled = images.double() / 255
    layer.fit(scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0))
    normalised = layer(images)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised, layer(images.float() / 255))
    assert set(layer.state_dict()) == {"mean", "std"}  # saved with the network


def test_normalize_does_not_scale_a_constant_channel():
    layer = Normalize()
    layer.fit(torch.full((3,), 7 / 255), torch.zeros(3))
    assert layer(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)).abs().max() < 1e-6


def test_whitening_makes_the_second_moment_of_patches_the_identity():
    images = torch.rand(400, 3, 10, 10, generator=torch.Generator().manual_seed(0)).cumsum(3)  # correlated pixels
    whiten = Whiten(kernel_size=2, eps=0.0)
    whiten.fit(images)
    patches = whiten(images)[:, :12].permute(0, 2, 3, 1).reshape(-1, 12)
    torch.testing.assert_close(patches.T @ patches / len(patches), torch.eye(12), atol=1e-3, rtol=0)
    assert torch.equal(whiten.filters[:12], -whiten.filters[12:])


def test_speednet_is_initialized_to_pass_its_input_on():
    block = SpeedNet().blocks[0]
    images = torch.rand(2, 24, 9, 9)
    torch.testing.assert_close(block.conv1(images)[:, :24], images)


@pytest.mark.parametrize("size", [16, 20, 32, 64])
def test_speednet_takes_images_of_any_size(size):
    network = SpeedNet(num_classes=7)
    assert network(torch.zeros(2, 3, size, size, dtype=torch.uint8)).shape == (2, 7)
    assert sum(parameter.numel() for parameter in SpeedNet().parameters()) == 1_971_328


@pytest.mark.slow
@pytest.mark.parametrize("network", [CNN, SpeedNet])
def test_compilation_in_bfloat16_does_not_change_gradients(network):
    torch.manual_seed(0)
    eager = network().to(memory_format=torch.channels_last)
    nn.init.normal_(eager.head.weight, std=0.1)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    eager.normalize.fit(torch.full((3,), 0.5), torch.full((3,), 0.29))
    if network is SpeedNet:
        eager.fit(images)
    compiled = copy.deepcopy(eager)
    compiled.compile()
    for one in (eager, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            logits = one(images)
        nn.functional.cross_entropy(logits.float(), torch.arange(32) % 10).backward()
    for expected, actual in zip(eager.parameters(), compiled.parameters(), strict=True):
        # rounding to bfloat16 alone changes eager gradients by about 0.2 of their norm
        assert (actual.grad - expected.grad).norm() < 0.3 * expected.grad.norm()


@pytest.mark.parametrize(("batch", "width"), [(16, 7), (12, 3), (7, 7), (4, 15), (20, 1)], ids=lambda value: str(value))
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_gradients_of_images_side_by_side_are_those_of_a_plain_convolution(batch, width, memory_format):
    torch.manual_seed(0)
    ours, plain = Conv3x3(5, 6), nn.Conv2d(5, 6, 3, padding=1, bias=False)
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(batch, 5, width + 1, width)
    factors = torch.randn(batch, 6, width + 1, width)
    gradients = []
    for convolution in (ours, plain):
        copy = images.clone(memory_format=memory_format).requires_grad_()
        (convolution(copy) * factors).sum().backward()
        gradients.append((copy.grad, convolution.weight.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_convolution_uses_the_precision_of_autocast():
    convolution, images = Conv3x3(4, 4), torch.randn(4, 4, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        output = convolution(images)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert convolution.weight.grad.dtype == torch.float32


OUT_OF_RANGE = {
    "cnn": ["drop_rate=nan", "drop_rate=-0.1", "drop_rate=1", "drop_rate=inf", "hidden=0", "hidden=1000000000"],
    "speednet": ["widths=[]", "widths=[0, 1, 1]", "widths=[4, -4]", "whiten_kernel_size=0"],
    "resnet20": ["depth=-4", "width=0", "drop_path_rate=1", "shortcut=zero"],
    "resnet18": ["depth=20", "width=0", "drop_path_rate=1"],
    "wide_resnet16_8": ["depth=-4", "width=0", "drop_path_rate=1", "drop_rate=nan"],
    "resnext29": ["depth=-4", "cardinality=0", "base_width=0", "drop_path_rate=1"],
    "densenet": ["depth=-4", "growth_rate=0", "drop_rate=nan"],
    "vgg16_bn": ["depth=12"],
    "vit": ["patch_size=0", "drop_path_rate=1", "mlp_ratio=0"],
    "cct7_3x1": ["kernel_size=64", "attn_drop_rate=-0.1"],
    "convmixer": ["patch_size=0"],
    "mobilenetv2": ["width=0"],
    "timm model.name=resnet18": ["drop_rate=1"],
}


@pytest.mark.parametrize(
    ("model", "setting"), [(model, setting) for model, settings in OUT_OF_RANGE.items() for setting in settings]
)
def test_settings_out_of_range_are_refused(config, model, setting):
    overrides = f"model={model}".split()
    validate(config(*overrides, without="model"))
    with pytest.raises(UserError) as error:
        validate(config(*overrides, f"++model.{setting}", without="model"))
    assert str(error.value).startswith(f"model.{setting}")


def test_check_output_does_not_change_the_network():
    torch.manual_seed(0)
    network = CNN(drop_rate=0.5)
    network.features.eval()
    state, modes = torch.get_rng_state(), [layer.training for layer in network.modules()]
    check_output(network, {8, 32}, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.training for layer in network.modules()] == modes
    with pytest.raises(UserError, match=r"The model fails on a 2×2 input .*data.train_sizes"):
        check_output(network, {2, 32}, 10)
    with pytest.raises(UserError, match=r"returns \[1, 10\] .*expected logits \[1, 3\]"):
        check_output(network, {32}, 3)
    with pytest.raises(UserError, match=r"returns dict .*expected logits"):
        check_output(type("Own", (nn.Module,), {"forward": lambda self, images: {}})(), {32}, 3)


@pytest.mark.parametrize("lazy", [nn.BatchNorm2d, nn.LazyBatchNorm2d])
def test_layers_in_eval_mode_stay_in_it(lazy):
    """A frozen norm stays frozen, whether or not a lazy layer is initialized by an image."""
    norm = lazy(3, affine=False) if lazy is nn.BatchNorm2d else lazy(affine=False)
    network = construct(lambda num_classes: nn.Sequential(nn.BatchNorm2d(3).eval(), norm), 7, 24)
    assert not network.network[0].training
    assert network.training
    assert norm.training
    assert norm.running_mean.shape == (3,)


def test_lazy_layers_are_initialized_by_an_image():
    network = construct(lambda num_classes: nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes)), 7, 24)
    assert network.training
    assert network.network[1].weight.shape == (7, 3 * 24 * 24)
