"""Comparisons of networks with their publications and with libraries."""

import shutil
import socket

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cifarnet
from cifarnet.evaluate import evaluate
from cifarnet.models.cct import CCT
from cifarnet.models.convmixer import ConvMixer
from cifarnet.models.mobilenetv2 import MobileNetV2
from cifarnet.models.vgg import VGG
from cifarnet.models.vit import ViT
from cifarnet.resuming import resume
from cifarnet.train import train

# by hand, for 32×32 images: a block at each of 16×16 positions, the stem, and the head
CONVMIXER = 8 * (25 * 256 + 256 * 256) * 256 + 12 * 256 * 256 + 2560
# 12 blocks for each of 65 tokens, attention between tokens, the patches, and the head
VIT = 12 * (65 * 12 * 192**2 + 2 * 65**2 * 192) + 64 * 48 * 192 + 1920
# timm's count for DeiT-Ti, https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k (5.7 M), with our patches,
# positions and classes instead of its 16×16 patches, 197 positions and 1000 classes
VIT_PARAMETERS = 5_717_416 - (768 * 192 + 197 * 192 + 193 * 1000) + (48 * 192 + 65 * 192 + 193 * 10)


@pytest.mark.parametrize(
    ("make", "settings", "parameters", "multiply_adds", "digits"),
    [
        # millions, https://github.com/chenyaofo/pytorch-cifar-models (README)
        (MobileNetV2, {}, 2.24, 87.98, 2),
        (MobileNetV2, {"width": 0.5}, 0.70, 27.97, 2),
        (MobileNetV2, {"width": 0.75}, 1.37, 59.31, 2),
        (MobileNetV2, {"width": 1.4}, 4.33, 170.07, 2),
        (VGG, {"depth": 11}, 9.76, 153.29, 2),
        (VGG, {"depth": 13}, 9.94, 228.79, 2),
        (VGG, {}, 15.25, 313.73, 2),
        (VGG, {"depth": 19}, 20.57, 398.66, 2),
        # https://github.com/SHI-Labs/Compact-Transformers (README): 3.760 M and 0.947 G, without attention
        # between tokens, 7 × 2 × 256² × 256, and the sum of the pooling, 256 × 256
        (CCT, {}, 3.760, 947, 0),
        # torchvision's count for the paper's 3.5 M, without 990 of its 1000 classes
        (MobileNetV2, {}, (3_504_872 - 990 * 1281) / 1e6, 87.98, 2),
        (ConvMixer, {}, 0.594186, CONVMIXER / 1e6, 6),  # 594,186: 3,840 + 8 × 73,472 + 2,570, by hand
        (ViT, {}, VIT_PARAMETERS / 1e6, VIT / 1e6, 6),
    ],
    ids=str,
)
def test_parameters_and_multiply_adds_equal_published_ones(make, settings, parameters, multiply_adds, digits):
    with torch.device("meta"):
        network = make(**settings).eval()
    counter = FlopCounterMode(display=False)
    with counter:
        network(torch.empty(1, 3, 32, 32, device="meta"))
    counted = counter.get_total_flops() / 2
    if make is CCT:
        counted -= 7 * 2 * 256**3 + 256**2
    published_digits = len(str(parameters).partition(".")[2])
    assert round(sum(weight.numel() for weight in network.parameters()) / 1e6, published_digits) == parameters
    assert round(counted / 1e6, digits) == multiply_adds
    assert network.head.out_features == 10


def reference(name: str) -> nn.Module:
    """Build the same network from a library."""
    if name == "mobilenetv2":
        stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2]]
        network = torchvision.models.MobileNetV2(10, inverted_residual_setting=[*stages, [6, 320, 1, 1]])
        network.features[0][0].stride = (1, 1)
        return network
    if name == "vgg":
        network = torchvision.models.vgg16_bn(num_classes=10)
        network.avgpool = nn.Identity()
        network.classifier[0], network.classifier[3] = nn.Linear(512, 512), nn.Linear(512, 512)
        network.classifier[6] = nn.Linear(512, 10)
        return network
    timm = pytest.importorskip("timm")
    if name == "convmixer":
        return timm.models.convmixer.ConvMixer(256, 8, kernel_size=5, patch_size=2, num_classes=10)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)


@pytest.mark.parametrize(
    ("name", "make"), [("mobilenetv2", MobileNetV2), ("vgg", VGG), ("convmixer", ConvMixer), ("vit", ViT)]
)
def test_outputs_equal_those_of_a_library_with_the_same_weights(name, make):
    torch.manual_seed(0)
    theirs, ours, images = reference(name), make().eval(), torch.rand(4, 3, 32, 32)
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0  # use the statistics of these images, so that signals do not vanish
    theirs.train()(images)
    theirs.eval()
    weights = list(theirs.state_dict().values())  # in the order of the layers
    if name == "vit":
        token, positions, *rest = weights
        weights = [token, positions[:, :1], positions[:, 1:].mT.unflatten(2, (8, 8)), *rest]
    names = [key for key in ours.state_dict() if not key.startswith("normalize.")]
    ours.load_state_dict(dict(zip(names, weights, strict=True)), strict=False)
    with torch.no_grad():
        expected = theirs(images)
        scale = expected.std(0).mean().item()  # outputs differ between images
        torch.testing.assert_close(ours(images), expected, rtol=1e-3, atol=1e-3 * scale)
    assert scale > 1e-5


@pytest.mark.parametrize("make", [MobileNetV2, VGG, ConvMixer, ViT, CCT])
def test_images_of_other_sizes(make):
    network = make(num_classes=7).eval()
    assert {len(network(torch.zeros(2, 3, size, size, dtype=torch.uint8))[0]) for size in (32, 40)} == {7}


@pytest.mark.parametrize("make", [ViT, CCT])
@torch.no_grad()
def test_positions_are_interpolated_at_other_sizes(make):
    network = make(width=8, depth=1, num_heads=2).eval()
    side = network.positions.shape[-1]
    network.positions.copy_(torch.linspace(-1, 1, side))  # from left to right, in all channels
    seen = []
    network.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -(side**2) :, 0]))
    for conv in (layer for layer in network.modules() if isinstance(layer, nn.Conv2d)):
        nn.init.zeros_(conv.weight)  # tokens do not depend on the image
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    network(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0].view(side, side), network.positions[0, 0])
    network(torch.rand(1, 3, 64, 64))
    rows = seen[1].view(-1, 2 * side)  # of the lower half
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    assert (rows[0].diff() > 0).all()
    assert rows[0, [0, -1]].tolist() == pytest.approx([-1, 1], abs=0.2 if side == 8 else 0.1)


@pytest.mark.parametrize("make", [ViT, CCT])
def test_drop_path_rate_rises_and_drops_whole_images(make):
    network = make(width=24, depth=3, num_heads=2, drop_path_rate=0.4)
    assert [block.drop_path.p for block in network.blocks] == pytest.approx([0, 0.2, 0.4])
    torch.manual_seed(0)
    kept = network.blocks[2].drop_path(torch.ones(2000, 5, 3))
    assert sorted(kept.unique().tolist()) == pytest.approx([0, 1 / 0.6])  # scaled, so that the mean does not change
    assert (kept.amax((1, 2)) == kept.amin((1, 2))).all()
    assert kept.mean().item() == pytest.approx(1, abs=0.1)
    network.eval()
    assert torch.equal(network.blocks[2].drop_path(torch.ones(4, 5, 3)), torch.ones(4, 5, 3))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (ViT, {"image_size": 30}, "image_size=30 is not a multiple of patch_size=4"),
        (ViT, {"num_heads": 5}, "width=192 is not a multiple of num_heads=5"),
        (CCT, {"num_heads": 3}, "width=256 is not a multiple of num_heads=3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.fixture(scope="module")
def photographs_500(photographs, tmp_path_factory):
    """50 training and 5 test images of each class."""
    target = tmp_path_factory.mktemp("photographs")
    for split, count in [("train", 50), ("test", 5)]:
        for folder in sorted((photographs / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, target / split / folder.name)
    return target


def refuse(*arguments):
    raise AssertionError(f"a download: {arguments}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mobilenetv2", ["model.width=0.25"]),
        ("vgg16_bn", ["model.depth=11"]),
        ("convmixer", ["model.width=32", "model.depth=2"]),
        ("vit", ["+model.width=48", "+model.depth=2"]),
        ("cct7_3x1", ["+model.width=32", "model.depth=2"]),
        ("timm", ["model.name=resnet10t", "+model.channels=[8,16,32,64]"]),
        ("timm", ["model.name=mobilenetv3_small_050", "model.drop_path_rate=0.1"]),
        ("timm", ["model.name=vit_tiny_patch16_224", "+model.patch_size=4", "+model.depth=2", "+model.embed_dim=48"]),
        ("timm", ["model.name=convnext_atto", "+model.patch_size=2", "+model.depths=[1,1,1,1]"]),
        ("timm", ["model.name=mixer_s32_224"]),
        ("timm", ["model.name=regnetx_002"]),
        ("torchvision", ["model.name=shufflenet_v2_x0_5"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_train_load_evaluate_and_resume_on_photographs(config, photographs_500, tmp_path, monkeypatch, name, settings):
    if name == "timm":
        pytest.importorskip("timm")
    settings = ["data=folder", f"data.root={photographs_500}", "data.batch_size=50", f"model={name}", *settings]
    settings += ["scheduler=constant", "optimizer.lr=0.01"]
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    train(config(*settings, without=("data", "model")))
    network, classes = cifarnet.load(tmp_path / "run")
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)
    assert len(classes) == 10
    assert evaluate(tmp_path / "run", ["corruptions=false", "output_dir=null"])["test"]["images"] == 50
    resumed, _ = resume(tmp_path / "run", ["trainer.max_epochs=3"])
    assert train(resumed) >= 0
