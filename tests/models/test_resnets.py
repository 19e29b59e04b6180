"""Residual and dense networks: their sizes, and how they train, load and evaluate."""

import json
import shutil
from functools import partial

import pytest
import torch
from hydra.utils import get_class
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

import cifarnet
from cifarnet.cli import compose
from cifarnet.evaluate import evaluate
from cifarnet.models.densenet import DenseNet
from cifarnet.models.resnet import CifarResNet, ResNet, ResNeXt, WideResNet
from cifarnet.resuming import resume
from cifarnet.train import train
from conftest import assert_same_weights

SMALL = {  # by config: a network of each family that trains in seconds
    "resnet20": dict(depth=8, width=4),
    "preact_resnet18": dict(width=4),
    "resnet50": dict(width=4),
    "wide_resnet16_8": dict(depth=10, width=1, drop_rate=0.3),
    "resnext29": dict(depth=11, cardinality=2, base_width=4),
    "densenet": dict(depth=16, growth_rate=4, drop_rate=0.2),
}


def small(config: str, **settings):
    chosen = dict(compose("train", [f"model={config}"]).model)
    return get_class(chosen.pop("_target_"))(**(chosen | SMALL[config] | settings))


# Parameters, and multiply-adds of convolutions and the head for one image of 32×32. Numbers that a source rounds were
# computed by hand, layer by layer: convolutions k²·in·out / groups (times H·W of the output), norms 2·channels, and the
# head in·10 + 10.
@pytest.mark.parametrize(
    ("config", "settings", "parameters", "multiply_adds"),
    [
        # He et al. (2015), table 6: 0.27, 0.46, 0.66, 0.85, 1.7 million; by hand: two more blocks in each of the three
        # stages have 194,432 parameters and 12 · 2,359,296 multiply-adds.
        ("resnet20", [], 269_722, 40_551_040),
        ("resnet32", [], 464_154, 68_862_592),
        ("resnet44", [], 658_586, 97_174_144),
        ("resnet56", [], 853_018, 125_485_696),
        ("resnet110", [], 1_727_962, 252_887_680),
        # chenyaofo/pytorch-cifar-models, whose shortcuts are convolutions: 0.27 M, 40.81 M
        ("resnet20", ["model.shortcut=conv"], 272_474, 40_813_184),
        # kuangliu/pytorch-cifar at 49b7aa9, its ResNet18, 34, 50 and PreActResNet18, counted in the same way
        ("resnet18", [], 11_173_962, 555_422_720),
        ("resnet34", [], 21_282_122, 1_159_402_496),
        ("resnet50", [], 23_520_842, 1_297_829_888),
        ("preact_resnet18", [], 11_171_146 + 2 * 512, 555_422_720),  # kuangliu's lacks the paper's last norm
        # Zagoruyko & Komodakis (2016), table 4: 36.5 and 11.0 million; the first exactly: osmr/imgclsmob's test of
        # wrn28_10_cifar10; multiply-adds by hand
        ("wide_resnet28_10", [], 36_479_194, 5_243_328_768),
        ("wide_resnet16_8", [], 10_961_370, 1_548_145_664),
        # Xie et al. (2016), table 7: 34.4 million; multiply-adds by hand
        ("resnext29", [], 34_426_698, 5_387_266_048),
        # Huang et al. (2016), table 2: 0.8 million; exactly: osmr/imgclsmob's test of densenet100_k12_bc_cifar10;
        # multiply-adds by hand
        ("densenet", [], 769_162, 287_929_692),
    ],
)
def test_sizes_equal_published_ones(config, settings, parameters, multiply_adds):
    chosen = dict(compose("train", [f"model={config}", *settings]).model)
    with torch.device("meta"):
        network = get_class(chosen.pop("_target_"))(**chosen).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert logits.shape == (1, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert counter.get_total_flops() == 2 * multiply_adds


@pytest.mark.parametrize("config", SMALL)
def test_arguments_and_image_sizes_change_inputs_and_outputs(config):
    network = small(config, num_classes=7, in_chans=1)
    for size in (16, 33):
        logits = network(torch.randint(0, 256, (2, 1, size, size), dtype=torch.uint8))
        assert logits.shape == (2, 7)
    logits.sum().backward()  # no in-place operation overwrites what gradients need
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.head.out_features == 7


@pytest.mark.parametrize(
    ("make", "rates"),
    [
        (partial(CifarResNet, depth=8, width=4), [0, 0.1, 0.2]),
        (partial(ResNet, width=1), [0.2 * block / 7 for block in range(8)]),
        (partial(WideResNet, depth=10, width=1), [0, 0.1, 0.2]),
        (partial(ResNeXt, depth=11, cardinality=1, base_width=1), [0, 0.1, 0.2]),
    ],
)
def test_drop_path_rate_rises_linearly(make, rates):
    found = [layer.p for layer in make(drop_path_rate=0.2).modules() if isinstance(layer, StochasticDepth)]
    assert found == pytest.approx(rates)


def test_pad_shortcut_takes_every_second_pixel_and_appends_zero_channels():
    block = CifarResNet(depth=8, width=4).layers[4]  # the first of the second stage
    x = torch.rand(2, 4, 6, 6)
    shortcut = block.shortcut(x)
    assert torch.equal(shortcut[:, :4], x[:, :, ::2, ::2])
    assert shortcut.shape == (2, 8, 3, 3)
    assert not shortcut[:, 4:].any()


@pytest.mark.parametrize("make", [partial(CifarResNet, depth=8), partial(ResNet, width=8)])
def test_preactivation_does_not_change_the_sum(make):
    """If residuals are zero, the first stage returns its input, negative values too (He et al., 2016, figure 4e)."""
    preact, post = (make(preact=preact).layers for preact in (True, False))
    for block in (preact[1], post[3]):
        torch.nn.init.zeros_(next(p for p in reversed(list(block.residual.parameters())) if p.ndim == 4))
    x = torch.randn(2, preact[0].out_channels, 5, 5)
    assert torch.equal(preact[1](x), x)
    assert torch.equal(post[3](x), x.relu())


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (partial(CifarResNet, depth=18), "use 6n"),
        (partial(WideResNet, depth=20), "use 6n"),
        (partial(ResNeXt, depth=28), "use 9n"),
        (partial(DenseNet, depth=101), "use 6n"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(make, what):
    ((name, value),) = make.keywords.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*{what}"):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["resnet20", "wide_resnet16_8", "resnext29", "densenet"])
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path):
    rates = {"drop_path_rate": 0.5} if config != "densenet" else {}
    data = ["data=synthetic", "data.train_size=200", "data.test_size=50", "data.batch_size=32", "trainer=cpu"]
    model = [f"model={config}", *(f"++model.{name}={value}" for name, value in (SMALL[config] | rates).items())]
    for folder, epochs in [("whole", 2), ("parts", 1)]:
        run = ["scheduler=constant", f"trainer.max_epochs={epochs}", f"output_dir={tmp_path / folder}"]
        train(compose("train", [*data, *model, *run]))
    train(*resume(tmp_path / "parts", ["trainer.max_epochs=2"]))
    assert_same_weights(*(tmp_path / folder / "checkpoints/last.ckpt" for folder in ("whole", "parts")))


@pytest.mark.slow
@pytest.mark.parametrize("config", SMALL)
def test_500_photographs(config, photographs, tmp_path):
    for split, count in [("train", 50), ("test", 5)]:
        for folder in sorted((photographs / split).iterdir()):
            target = tmp_path / "few" / split / folder.name
            target.mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, target)
    settings = [f"++model.{name}={value}" for name, value in SMALL[config].items()]
    data = ["data=folder", f"data.root={tmp_path / 'few'}", "data.batch_size=50", "data.train_sizes=[24,32]"]
    where = [f"model={config}", "trainer=cpu", "trainer.max_epochs=2", f"output_dir={tmp_path / 'run'}"]
    train(compose("train", [*data, *where, *settings, "optimizer.lr=0.05"]))
    trained = json.loads((tmp_path / "run/metrics.json").read_text())
    network, names = cifarnet.load(tmp_path / "run")
    assert not network.training
    assert len(names) == 10
    assert network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).isfinite().all()
    measured = evaluate(tmp_path / "run", ["corruptions=false"])
    assert measured["test"]["accuracy"] == trained["test_accuracy"]
