"""Training steps on a GPU, simulated without one by fake tensors, which have a device but no values.

PyTorch's FakeTensorMode computes shapes, types and devices. It does not support backward passes (the tests give each
weight a gradient of its shape) and fused optimizers.
"""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifarnet.build import build
from cifarnet.classifier import Classifier
from cifarnet.cli import CONFIGS, compose

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")  # without autocast, everything is float32
GPU = torch.device("cuda", 0)
FEW = ["data=synthetic", "data.train_size=140", "data.test_size=20", "data.batch_size=16", "data.eval_batch_size=8"]
NETWORKS = [  # one of each family
    *("cnn", "speednet", "resnet20", "preact_resnet18", "resnet50", "wide_resnet16_8", "resnext29", "densenet"),
    *("mobilenetv2", "vgg16_bn", "convmixer", "vit", "cct7_3x1"),
]


class GPUError(AssertionError):
    """An operation that a GPU refuses, or for which the host waits."""


class Done(Exception):
    """Ends the rehearsal."""


class GPURules(TorchDispatchMode):
    """While it is active, refuses operations on tensors of both devices, and copies for which the host waits."""

    active = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if not self.active:
            return result
        schema = operation._schema
        if schema.name in ("aten::_to_copy", "aten::to", "aten::copy_"):
            named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            source = named["src" if schema.name == "aten::copy_" else "self"]
            waits = source.device.type == "cuda" or not named.get("non_blocking")
            if result.device != source.device and waits:
                raise GPUError(f"{schema.name} from {source.device} to {result.device}")
        else:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            devices = {tensor.device.type for tensor in tensors if tensor.ndim}
            if len(devices) > 1:
                raise GPUError(f"{schema.name} of tensors on several devices")
        return result


class Rehearsal(Callback):
    """Ends training after three batches, of which the first may break the rules, and the test after two."""

    def __init__(self, rules):
        self.rules = rules

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rules.active = batch_idx > 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.rules.active = False
            raise Done

    def on_test_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.rules.active = True

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            with trainer.precision_plugin.test_step_context():
                answers = module._averaged.final()
            self.rules.active = False
            assert {answer.device for answer in answers} == {GPU}
            raise Done


def move(module):
    """Replace parameters and buffers by fake tensors on a GPU."""
    for layer in module.modules():
        for tensors, wrap in ((layer._parameters, nn.Parameter), (layer._buffers, lambda tensor, _: tensor)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)
                    tensors[name] = wrap(moved, tensor.requires_grad)


@pytest.fixture
def rehearse(monkeypatch, tmp_path):
    """Train and test as on a GPU: rehearse("+experiment=speedrun", …)."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "rehearsed")

    for loop in ("fit_loop", "evaluation_loop"):  # Lightning sums lengths over ranks on the GPU before the first step
        monkeypatch.setattr(f"lightning.pytorch.loops.{loop}.has_len_all_ranks", lambda *_, **__: True)

    def gradients(loss_or_none=None, weights=(), **_):
        return [torch.empty_like(weight) for weight in weights]

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(Tensor, "__deepcopy__", lambda one, memo: memo.setdefault(id(one), torch.empty_like(one)))

    def run(*settings):
        def backward(loss):
            assert loss.device == GPU
            assert loss.requires_grad
            for weight in built.classifier.network.parameters():
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None

        quiet = ["trainer=cpu", "trainer.max_epochs=2", f"output_dir={tmp_path}", "callbacks=lean"]
        config = compose("train", [*FEW, *quiet, *settings])
        if "fused" in config.optimizer:
            config.optimizer.fused = False
        rules = GPURules()
        built = build(config, [Rehearsal(rules)], logger=False)
        source = built.data.source  # images are read before tensors become fake
        strategy = built.trainer.strategy
        strategy._root_device, strategy.precision_plugin = GPU, MixedPrecision("bf16-mixed", "cuda")
        for moves in ("model_to_device", "teardown"):  # fake tensors cannot be moved
            monkeypatch.setattr(strategy, moves, lambda: None)
        monkeypatch.setattr(strategy.accelerator, "setup_device", lambda device: None)
        # fake tensors cannot be saved
        monkeypatch.setattr("cifarnet.callbacks.training_state.check_state", lambda part: None)
        monkeypatch.setattr(built.classifier, "backward", backward, raising=False)
        teacher = built.classifier.teacher
        with FakeTensorMode(allow_non_fake_inputs=True), rules:
            move(built.classifier)
            if teacher is not None:
                move(teacher.network)
                teacher.device = GPU
            for split in (source.train, source.validation, source.test):
                split.images, split.labels = torch.empty_like(split.images), torch.empty_like(split.labels)
            for stage in (built.trainer.fit, built.trainer.test):
                with pytest.raises(Done):
                    stage(built.classifier, datamodule=built.data)

    return run


def choices(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_trains_and_tests(rehearse, network):
    rehearse(f"model={network}")


@pytest.mark.parametrize("optimizer", choices("optimizer"))
def test_every_optimizer_steps(rehearse, optimizer):
    rehearse(f"optimizer={optimizer}", "model=speednet")


@pytest.mark.parametrize("recipe", sorted({*choices("recipe")} - {"distillation", "no_decay"}))
def test_every_recipe_trains_and_tests(rehearse, recipe):
    rehearse(f"+recipe={recipe}", "model=speednet")


@pytest.mark.parametrize(
    "settings",
    [
        ["objective=focal"],
        ["+recipe=no_decay"],
        ["data.on_device=false"],
        ["data.cutout=8"],
        ["data.hardest_share=0.7"],
        ["data.train_sizes=[24]"],
        ["+recipe=[mixup,ema,clip]", "data.train_sizes=[24]"],
        ["+experiment=speedrun", "data=synthetic", *FEW],
        ["module.tta=mirror"],
        ["module.tta=mirror_translate", "module.tta_share=0.4"],
        ["+recipe.freeze={_target_: cifarnet.recipes.freeze.Freeze, part: blocks.0, epoch: 1}"],
        ["+recipe.backbone={_target_: cifarnet.recipes.backbone.Backbone, lr_scale: 0.1}", "scheduler=linear"],
    ],
    ids=lambda settings: " ".join(setting for setting in settings if setting not in FEW)[:60],
)
def test_every_setting_trains_and_tests(rehearse, settings):
    rehearse("model=speednet", *settings)


def test_distillation_trains_and_tests(rehearse, run):
    rehearse("model=cnn", "+recipe=distillation", f"module.teacher.checkpoint={run}", "classes=[]")


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (lambda logits: logits.sum().item(), DataDependentOutputException),
        (lambda logits: float(logits.detach().sum()) > 0, DataDependentOutputException),
        (lambda logits: logits.detach().cpu(), GPUError),
        (lambda logits: logits[torch.arange(2)], GPUError),
        (lambda logits: logits + torch.zeros(10), (GPUError, RuntimeError)),
        (lambda logits: torch.tensor([1.0, 2.0], device=logits.device), GPUError),
    ],
    ids=["item", "float", "cpu", "index", "mixed", "upload"],
)
@pytest.mark.parametrize("stage", ["train", "one_view"])
def test_a_rehearsal_finds_mistakes(rehearse, monkeypatch, mistake, error, stage):
    count = Classifier._count

    def wrong(self, at, loss, logits, labels):
        if at == stage:
            mistake(logits)
        count(self, at, loss, logits, labels)

    monkeypatch.setattr(Classifier, "_count", wrong)
    with pytest.raises(error):
        rehearse("model.widths=[2,2]", "model.hidden=4")
