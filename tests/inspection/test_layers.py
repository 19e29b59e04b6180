"""The table of layers against formulas by hand and the papers' numbers."""

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from cifarnet import cli
from cifarnet.inspection.layers import table
from cifarnet.models import construct


def network(name, *overrides):
    model = cli.compose("train", [f"model={name}", "output_dir=run", *overrides]).model
    return construct(instantiate(model, _partial_=True), num_classes=10, image_size=32)


def images(count):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def rows(net, batch, depth=None):
    """The rows of the table by name: class, output, parameters, multiply-adds in millions, activations in MiB."""
    heading, *lines = table(net, batch, depth).splitlines()
    starts = [heading.index(name) for name in ("layer", "class", "output", " parameters", "multiply", "activations")]
    places = [slice(*pair) for pair in zip(starts, [*starts[1:], None], strict=True)]
    cells = [[line[place].strip() for place in places] for line in lines]
    return {"" if name == "(network)" else name: (*texts, number(count)) for name, *texts, count in cells}


def number(text):
    return float(text.replace(",", ""))


def millions(count):
    return f"{count / 1e6:,.2f}"


def test_convolutions_and_matrices_are_counted_as_by_hand():
    found = rows(network("cnn", "model.widths=[40,60,80,100]", "model.hidden=160"), images(5))
    by_hand = {  # in_chans, out_chans, height and width of the output
        "features.0": (3, 40, 32),
        "features.2": (40, 60, 32),
        "features.6": (60, 80, 16),
        "features.8": (80, 100, 16),
    }
    counts = {}
    for name, (in_chans, out_chans, size) in by_hand.items():
        counts[name] = in_chans * out_chans * 9 * size**2
        kind, shape, parameters, multiply_adds, _ = found[name]
        assert (kind, shape) == ("Conv2d", f"{out_chans}×{size}×{size}")
        assert number(parameters) == in_chans * out_chans * 9 + out_chans
        assert multiply_adds == millions(counts[name])
    counts |= {"hidden.1": 100 * 8 * 8 * 160, "head": 160 * 10}
    assert found["hidden.1"][3] == millions(counts["hidden.1"])
    assert found["head"][3] == "0.00"
    assert found[""][3] == millions(sum(counts.values()))
    assert number(found[""][2]) == sum(number(found[name][2]) for name in counts)


def test_attention_is_counted_as_by_hand():
    found = rows(network("vit"), images(2))
    tokens, width = map(int, found["blocks.0.attention.1"][1].split("×"))
    linear, attention = tokens * width * 4 * width, 2 * tokens**2 * width  # QKᵀ, and its product with V
    assert found["blocks.0.attention.1.qkv"][3] == millions(tokens * width * 3 * width)
    assert found["blocks.0.attention.1"][3] == millions(linear + attention)


def test_whole_network_has_the_size_of_the_paper():
    """He et al. (2015), table 6; the multiply-adds are those of its 19 convolutions."""
    [(_, _, parameters, multiply_adds, _)] = [rows(network("resnet20"), images(2))[""]]
    assert number(parameters) == pytest.approx(0.27e6, rel=0.01)
    assert multiply_adds == millions(3 * 16 * 9 * 32**2 + (6 + 5.5 + 5.5) * 16 * 16 * 9 * 32**2 + 64 * 10)


def test_activations_are_those_that_autograd_keeps():
    """A channel of the batch has 1 MiB. A batch norm also keeps the mean and the deviation, which are small."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4096, 10)
    )
    batch = torch.rand(256, 3, 32, 32)
    # the matrix product keeps the output of the ReLU, which is counted there
    assert [row[4] for row in rows(net, batch).values()] == [3 + 4 + 4, 3, 4, 4, 0, 0]
    frozen = net.requires_grad_(False)
    assert [row[4] for row in rows(frozen, batch).values()] == [0] * 6


def test_table_has_the_depth():
    names = [[*rows(network("resnet20"), images(2), depth)] for depth in (1, 2, None)]
    assert names[0] == ["", "normalize", "layers", "head"]
    assert "layers.3" in names[1]
    assert "layers.3.residual" not in names[1]
    assert names[2] == [name for name, _ in network("resnet20").named_modules()]
