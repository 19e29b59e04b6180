"""The table of layers against formulas by hand and the papers' numbers."""

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from cifarnet import cli
from cifarnet.inspection.layers import layers, table
from cifarnet.models import construct


def network(name, *overrides):
    model = cli.compose("train", [f"model={name}", "output_dir=run", *overrides]).model
    return construct(instantiate(model, _partial_=True), num_classes=10, image_size=32)


def images(count):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def test_convolutions_and_matrices_are_counted_as_by_hand():
    rows = {row.name: row for row in layers(network("cnn", "model.widths=[4,6,8,10]", "model.hidden=16"), images(5))}
    by_hand = {  # in_chans, out_chans, height and width of the output
        "features.0": (3, 4, 32),
        "features.2": (4, 6, 32),
        "features.6": (6, 8, 16),
        "features.8": (8, 10, 16),
    }
    for name, (in_chans, out_chans, size) in by_hand.items():
        assert rows[name].shape == (out_chans, size, size)
        assert rows[name].parameters == in_chans * out_chans * 9 + out_chans
        assert rows[name].multiply_adds == in_chans * out_chans * 9 * size**2
    assert rows["hidden.1"].multiply_adds == 10 * 8 * 8 * 16
    assert rows["head"].multiply_adds == 16 * 10
    counted = [*by_hand, "hidden.1", "head"]
    for column in ("parameters", "multiply_adds"):
        assert getattr(rows[""], column) == sum(getattr(rows[name], column) for name in counted)


def test_attention_is_counted_as_by_hand():
    rows = {row.name: row for row in layers(network("vit"), images(2))}
    tokens, width = rows["blocks.0.attention.1"].shape
    linear = rows["blocks.0.attention.1.qkv"].multiply_adds + rows["blocks.0.attention.1.proj"].multiply_adds
    assert linear == tokens * width * 4 * width
    assert rows["blocks.0.attention.1"].multiply_adds - linear == 2 * tokens**2 * width  # QKᵀ, and its product with V


def test_whole_network_has_the_size_of_the_paper():
    """He et al. (2015), table 6; the multiply-adds are those of its 19 convolutions."""
    whole = layers(network("resnet20"), images(2))[0]
    assert whole.parameters == pytest.approx(0.27e6, rel=0.01)
    assert whole.multiply_adds == 3 * 16 * 9 * 32**2 + (6 + 5.5 + 5.5) * 16 * 16 * 9 * 32**2 + 64 * 10


def test_activations_are_those_that_autograd_keeps():
    size, count = 8, 3
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 64, 10)
    )
    rows = layers(net, torch.rand(count, 3, size, size))
    pixels = 4 * count * size * size  # bytes of a channel
    kept = [3 * pixels, 4 * pixels + 2 * 4 * 4, 4 * pixels, 0, 0]  # a batch norm also keeps the mean and the deviation
    # the matrix product keeps the output of the ReLU, which is counted there
    assert [row.activations for row in rows] == [sum(kept), *kept]
    frozen = net.requires_grad_(False)
    assert [row.activations for row in layers(frozen, torch.rand(count, 3, size, size))] == [0] * 6


def test_table_has_the_depth():
    rows = layers(network("resnet20"), images(2))
    names = [[line.split()[0] for line in table(rows, depth).splitlines()[1:]] for depth in (1, 2, None)]
    assert names[0] == ["(network)", "normalize", "layers", "head"]
    assert "layers.3" in names[1]
    assert "layers.3.residual" not in names[1]
    assert len(names[2]) == len(rows)
