"""Steps as on a GPU, rehearsed without one: fake tensors know on which device each would be.

PyTorch's FakeTensorMode computes shapes, types and devices, and no values. What it leaves out: backward passes (here
every weight gets a gradient of its own shape) and fused optimizers.
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

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")  # so there is no autocast, and all is float32
GPU = torch.device("cuda", 0)
FEW = ["data=synthetic", "data.train_size=140", "data.test_size=20", "data.batch_size=16", "data.eval_batch_size=8"]
NETWORKS = [  # small ones of every family
    *("cnn", "speednet", "resnet20", "preact_resnet18", "resnet50", "wide_resnet16_8", "resnext29", "densenet"),
    *("mobilenetv2", "vgg16_bn", "convmixer", "vit", "cct7_3x1"),
]


class Waits(AssertionError):
    """A GPU would refuse it, or the host would wait for it."""


class Over(Exception):
    """All that was to be rehearsed has been."""


class GPURules(TorchDispatchMode):
    """While it is armed, no operation has tensors of both devices, and none copies while the host waits."""

    armed = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if not self.armed:
            return result
        schema = operation._schema
        if schema.name in ("aten::_to_copy", "aten::to", "aten::copy_"):
            named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            source = named["src" if schema.name == "aten::copy_" else "self"]
            waits = source.device.type == "cuda" or not named.get("non_blocking")
            if result.device != source.device and waits:
                raise Waits(f"{schema.name} from {source.device} to {result.device}")
        else:
            devices = {one.device.type for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.ndim}
            if len(devices) > 1:
                raise Waits(f"{schema.name} of tensors on several devices")
        return result


class Rehearsal(Callback):
    """Three batches of an epoch, of which the rules are for all but the first; then two of the test."""

    def __init__(self, rules):
        self.rules = rules

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rules.armed = batch_idx > 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.rules.armed = False
            raise Over

    def on_test_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.rules.armed = True

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            with trainer.precision_plugin.test_step_context():
                answers = module._answers.final()
            self.rules.armed = False
            assert {answer.device for answer in answers} == {GPU}
            raise Over


def move(module):
    """Parameters and buffers as on a GPU."""
    for part in module.modules():
        for kind, wrap in ((part._parameters, nn.Parameter), (part._buffers, lambda one, _: one)):
            for name, one in kind.items():
                if one is not None:
                    there = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=GPU)
                    kind[name] = wrap(there, one.requires_grad)


@pytest.fixture
def rehearse(monkeypatch, tmp_path):
    """Train and test, as on a GPU: rehearse("+experiment=speedrun", …)."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "rehearsed")

    for loop in ("fit_loop", "evaluation_loop"):  # Lightning adds lengths up over ranks on the GPU, before any step
        monkeypatch.setattr(f"lightning.pytorch.loops.{loop}.has_len_all_ranks", lambda *_, **__: True)

    def gradients(loss_or_none=None, weights=(), **_):
        return [torch.empty_like(weight) for weight in weights]

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    monkeypatch.setattr(Tensor, "pin_memory", lambda one: one)
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
        source = built.data.source  # read before all becomes fake
        strategy = built.trainer.strategy
        strategy._root_device, strategy.precision_plugin = GPU, MixedPrecision("bf16-mixed", "cuda")
        for moves in ("model_to_device", "teardown"):  # which fake weights cannot do
            monkeypatch.setattr(strategy, moves, lambda: None)
        monkeypatch.setattr(strategy.accelerator, "setup_device", lambda device: None)
        monkeypatch.setattr(built.classifier, "backward", backward, raising=False)
        teacher = built.classifier.teacher
        with FakeTensorMode(allow_non_fake_inputs=True), rules:
            move(built.classifier)
            if teacher is not None:
                move(teacher.network)
                teacher.device = GPU
            for split in (source.train, source.val, source.test):
                split.images, split.labels = torch.empty_like(split.images), torch.empty_like(split.labels)
            for act in (built.trainer.fit, built.trainer.test):
                with pytest.raises(Over):
                    act(built.classifier, datamodule=built.data)

    return run


def folders(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_trains_and_tests(rehearse, network):
    rehearse(f"model={network}")


@pytest.mark.parametrize("optimizer", folders("optimizer"))
def test_every_optimizer_steps(rehearse, optimizer):
    rehearse(f"optimizer={optimizer}", "model=speednet")


@pytest.mark.parametrize("recipe", sorted({*folders("recipe")} - {"distillation", "no_decay"}))
def test_every_recipe(rehearse, recipe):
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
        ["+recipe.own={_target_: cifarnet.recipes.backbone.Backbone, lr_scale: 0.1}", "scheduler=linear"],
    ],
    ids=lambda settings: " ".join(one for one in settings if one not in FEW)[:60],
)
def test_every_switch(rehearse, settings):
    rehearse("model=speednet", *settings)


def test_a_teacher(rehearse, run):
    rehearse("model=cnn", "+recipe=distillation", f"module.teacher.checkpoint={run}", "classes=[]")


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (lambda logits: logits.sum().item(), DataDependentOutputException),
        (lambda logits: float(logits.detach().sum()) > 0, DataDependentOutputException),
        (lambda logits: logits.detach().cpu(), Waits),
        (lambda logits: logits[torch.arange(2)], Waits),
        (lambda logits: logits + torch.zeros(10), (Waits, RuntimeError)),
        (lambda logits: torch.tensor([1.0, 2.0], device=logits.device), Waits),
    ],
    ids=["item", "float", "cpu", "index", "mixed", "upload"],
)
@pytest.mark.parametrize("stage", ["train", "one_view"])
def test_it_hears_a_mistake(rehearse, monkeypatch, mistake, told, stage):
    count = Classifier._count

    def wrong(self, at, loss, logits, labels):
        if at == stage:
            mistake(logits)
        count(self, at, loss, logits, labels)

    monkeypatch.setattr(Classifier, "_count", wrong)
    with pytest.raises(told):
        rehearse("model.widths=[2,2]", "model.hidden=4")
