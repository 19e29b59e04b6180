import hashlib
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from cifarnet import cli
from cifarnet.build import build
from cifarnet.checkpoint import Checkpoint
from cifarnet.errors import UserError
from cifarnet.finetuning import expand, transfer_weights
from cifarnet.models import SpeedNet
from cifarnet.recipes.backbone import head_name
from cifarnet.resuming import resume
from cifarnet.train import main, train
from conftest import LEARNS, assert_same_weights, picture, small, weights

HEAD, NORM = "network.head.weight", "network.normalize.mean"


@pytest.fixture
def base(run, tmp_path):
    """A copy of the run, which a test may delete."""
    return shutil.copytree(run, tmp_path / "base")


@pytest.fixture
def finetune(base, tmp_path):
    """Compose the fine-tuning of `base` to images of two colours."""
    for split, count in {"train": 12, "test": 4}.items():
        for name, colour in {"red": (200, 20, 20), "blue": (20, 20, 200)}.items():
            for i in range(count):
                picture(tmp_path / "pictures" / split / name / f"{i}.png", tuple(value + i for value in colour))

    def compose(*overrides, folder="tuned"):
        settings = [f"model.checkpoint={base}", f"data.root={tmp_path}/pictures", f"output_dir={tmp_path / folder}"]
        small = ["data.batch_size=4", "trainer=cpu", "trainer.max_epochs=1", "trainer.precision=32-true", "threads=1"]
        return cli.compose("train", ["+experiment=finetune", *settings, *small, *overrides])

    return compose


def train_weights(config) -> dict[str, torch.Tensor]:
    train(config)
    return weights(f"{config.output_dir}/checkpoints/last.ckpt")


def test_the_recorded_network_replaces_the_checkpoint_in_the_config(finetune, base):
    composed = finetune("+model.side_by_side=false")
    before = OmegaConf.to_container(composed)
    config = expand(composed)
    assert config.model == {"_target_": "cifarnet.models.speednet.SpeedNet", "widths": [8, 8, 8], "side_by_side": False}
    file = base / "checkpoints/best.ckpt"
    assert config.start == {"checkpoint": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert OmegaConf.to_container(composed) == before
    assert expand(config) is config


def test_all_weights_but_the_head_are_kept(finetune, base):
    before = weights(base / "checkpoints/best.ckpt")
    after = train_weights(finetune("optimizer.lr=0", "recipe.backbone=null"))
    assert after[HEAD].shape == (2, 8)
    learned = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key in learned if "running_" not in key and "num_batches" not in key} == {HEAD}
    assert before[NORM].abs().sum() > 0


def test_the_backbone_learns_at_a_smaller_rate(finetune, base):
    seen = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            (optimizer,) = trainer.optimizers
            seen["rates"] = {group["backbone"]: group["lr"] for group in optimizer.param_groups}
            seen["sizes"] = {group["backbone"]: len(group["params"]) for group in optimizer.param_groups}

    before = weights(base / "checkpoints/best.ckpt")
    config = finetune("scheduler=constant", "recipe.backbone.lr_scale=0.25", "optimizer.lr=0.02")
    train(config, callbacks=[Watch()])
    assert seen["rates"] == {True: pytest.approx(0.005), False: pytest.approx(0.02)}
    assert seen["sizes"][False] == 1
    after = weights(f"{config.output_dir}/checkpoints/last.ckpt")
    assert not torch.equal(before["network.blocks.0.conv1.weight"], after["network.blocks.0.conv1.weight"])


def test_the_first_session_prints_the_checkpoint_and_the_images_that_epochs_drop(finetune, base, capsys):
    config = finetune("data.batch_size=8", "scheduler=constant")
    train(config)
    printed = capsys.readouterr().out
    assert f"from the weights of {base}/checkpoints/best.ckpt\n" in printed
    assert re.search(r"data\.batch_size=8: .* 6 of 22 images", printed)
    train(*resume(config.output_dir, ["trainer.max_epochs=2"]))
    assert "from the weights of" not in capsys.readouterr().out


def test_few_images_are_one_batch(finetune, capsys):
    train(finetune("data.batch_size=32"))
    printed = capsys.readouterr().out
    assert re.search(r"data\.batch_size=32: .*22 images", printed)
    assert "drops" not in printed


def test_with_a_scale_of_0_only_the_head_learns(finetune, base):
    before = weights(base / "checkpoints/best.ckpt")
    after = train_weights(finetune("recipe.backbone.lr_scale=0", "+recipe=no_decay"))
    start = train_weights(finetune("optimizer.lr=0", "recipe.backbone=null", folder="start"))
    assert not torch.equal(after[HEAD], start[HEAD])
    for key in before.keys() - {HEAD}:
        assert "running_" in key or "num_batches" in key or torch.equal(before[key], after[key]), key


def test_the_head_is_kept_if_the_classes_are_the_same(base, tmp_path):
    settings = [setting for setting in LEARNS if not setting.startswith(("model", "optimizer", "scheduler", "module"))]
    overrides = [f"model.checkpoint={base}", "optimizer.lr=0", f"output_dir={tmp_path}/tuned"]
    after = train_weights(cli.compose("train", ["+experiment=finetune", *settings, *overrides]))
    assert torch.equal(after[HEAD], weights(base / "checkpoints/best.ckpt")[HEAD])


def test_the_head_is_not_kept_if_only_the_number_of_classes_is_the_same(run):
    names = Checkpoint.open(run).class_names
    before = weights(run / "checkpoints/best.ckpt")[HEAD]
    config = OmegaConf.create({"start": {"checkpoint": str(run)}})
    for class_names, is_kept in [(names, True), (names[::-1], False), ([*names[:-1], "other"], False)]:
        network = SpeedNet(widths=[8, 8, 8])
        initial = network.head.weight.detach().clone()
        transfer_weights(network, config, SimpleNamespace(class_names=class_names, image_size=32))
        assert torch.equal(network.head.weight, before if is_kept else initial)
        assert torch.equal(network.normalize.mean, weights(run / "checkpoints/best.ckpt")[NORM])


def test_a_run_can_be_resumed_and_loaded_without_the_checkpoint_it_started_from(resumed_run, finetune, base, tmp_path):
    remove = partial(shutil.rmtree, base)
    resumed_run("trainer.max_epochs=2", compose=finetune, moment=(0, 2), meanwhile=remove)
    tuned = Checkpoint.open(tmp_path / "parts")
    assert tuned.class_names == ["blue", "red"]
    assert tuned.network()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("scheduler=onecycle trainer.max_epochs=2", "scheduler=OneCycleLR .*recipe.backbone=null"),
        ("optimizer=muon", "parameter groups .*recipe.backbone"),
        ("recipe.backbone.lr_scale=2", r"recipe\.backbone\.lr_scale=2 is out of range"),
        ("data.image_size=24", r"24 pixels wide; .* was trained on images of 32 .*data\.image_size=32"),
        ("model.checkpoint=nowhere", "nowhere: no checkpoint found"),
        ("+model.widths=[4,4,4]", r"weights in .*best\.ckpt do not fit the network: .* such as blocks\.0"),
        ("model.checkpoint=???", r"model\.checkpoint is required"),
        ("+model.nonsense=1", r"model\.nonsense=1: .* has no argument nonsense"),
    ],
)
def test_settings_that_cannot_be_used_are_reported(finetune, overrides, message):
    with pytest.raises(UserError, match=message):
        train(finetune(*overrides.split()))


def test_a_sweep_of_fine_tuning_is_resumed(finetune, base, tmp_path, command):
    finetune()  # writes the images
    sources = ["+experiment=finetune", f"model.checkpoint={base}", f"data.root={tmp_path}/pictures"]
    small = ["data.batch_size=4", "trainer=cpu", "trainer.max_epochs=2", "trainer.precision=32-true", "threads=1"]
    status, _, err = command("-m", *sources, *small, "seed=0,1", "hydra.sweep.dir=sweep", main=main)
    assert status == 0, err
    before = weights(tmp_path / "sweep/1/checkpoints/last.ckpt")
    (tmp_path / "sweep/1/metrics.json").unlink()
    status, out, err = command("sweep.resume=sweep", main=main)
    assert status == 0, err
    assert "Job 0 is done" in out
    assert "Job 1 is done" not in out
    after = weights(tmp_path / "sweep/1/checkpoints/last.ckpt")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("target", ["os.system", "torch.load", "cifarnet.train.train"])
def test_a_checkpoint_cannot_name_other_classes(finetune, changed, target):
    def alter(content):
        content["hyper_parameters"]["model"] = {"_target_": target, "command": "exit 3"}

    with pytest.raises(UserError, match=r"changed\.ckpt names the class"):
        train(finetune(f"model.checkpoint={changed(alter)}"))


@pytest.mark.parametrize("value", [{"_target_": "os.mkdir", "path": "exploded"}, "${oc.env:HOME}", ["${seed}"]])
def test_arguments_in_a_checkpoint_are_plain_data(finetune, changed, tmp_path, monkeypatch, value):
    """Hydra would import what `_target_` names, and OmegaConf would evaluate `${…}`."""
    monkeypatch.chdir(tmp_path)
    path = changed(lambda content: content["hyper_parameters"]["model"].update(widths=value))
    with pytest.raises(UserError, match=r"changed\.ckpt: model\.widths=.* not plain data"):
        train(finetune(f"model.checkpoint={path}"))
    assert not (tmp_path / "exploded").exists()


def test_the_config_of_a_checkpoint_is_not_used(finetune, changed):
    def alter(content):
        content["hyper_parameters"]["config"] = {"model": {"_target_": "os.system"}, "callbacks": "${x}"}

    config = expand(finetune(f"model.checkpoint={changed(alter)}"))
    assert config.model == {"_target_": "cifarnet.models.speednet.SpeedNet", "widths": [8, 8, 8]}


def test_the_head_is_the_last_layer():
    assert head_name(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))) == "2"
    with pytest.raises(UserError, match="layer that could be its head"):
        head_name(torch.nn.ReLU())


class Batches(Callback):
    """Keeps the batches of a run."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append((batch.images.clone(), batch.labels.clone()))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train(small(f"output_dir={folder}", "scheduler=cosine", "callbacks.pictures=null"))
    return folder


def start(run) -> list[str]:
    return [f"start.checkpoint={run}", "start.optimizer=true", "scheduler=cosine", "callbacks.pictures=null"]


def continuing(config, run, *overrides):
    return config(*start(run), *overrides, folder="next")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_new_schedule_continues_with_the_state_of_the_optimizer_as_in_plain_pytorch(config, tmp_path, optimizer):
    first = config(f"optimizer={optimizer}", "scheduler=constant", "callbacks.pictures=null", folder="first")
    train(first)
    seen = Batches()
    settings = [f"optimizer={optimizer}", "optimizer.lr=0.02", "trainer.max_epochs=3"]
    continued = continuing(config, tmp_path / "first", *settings)
    train(continued, callbacks=[seen])

    last = tmp_path / "first/checkpoints/last.ckpt"
    network = Checkpoint.open(last).network().train().to(memory_format=torch.channels_last)
    state = torch.load(last, weights_only=True)["optimizer_states"][0]["state"]
    arguments = {key: value for key, value in first.optimizer.items() if key != "_target_"} | {"lr": 0.02}
    plain = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](network.parameters(), **arguments)
    for parameter, values in zip(network.parameters(), state.values(), strict=True):
        plain.state[parameter] = {name: value.clone() for name, value in values.items()}
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, len(seen.batches))
    for images, labels in seen.batches:
        plain.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        plain.step()
        schedule.step()
    after = weights(tmp_path / "next/checkpoints/last.ckpt")
    assert len(seen.batches) == 3 * 5
    for name, value in network.state_dict().items():
        assert torch.equal(after[f"network.{name}"], value), name


def test_a_continued_run_is_resumed_without_the_run_it_started_from(resumed_run, first, tmp_path):
    base = shutil.copytree(first, tmp_path / "base")
    resumed_run(*start(base), moment=(0, 2), meanwhile=partial(shutil.rmtree, base))


@pytest.mark.parametrize("source", ["start.checkpoint", "model.checkpoint"])
def test_build_starts_from_the_last_checkpoint_as_train_does(config, first, source):
    model = ["model=trained", "start.checkpoint=null"] if source == "model.checkpoint" else []
    settings = ["start.optimizer=true", "scheduler=cosine", *model, f"{source}={first}"]
    built = build(config(*settings, without="model." if model else "-"))
    expected = weights(first / "checkpoints/last.ckpt")
    assert all(torch.equal(value, expected[name]) for name, value in built.classifier.state_dict().items())
    sha256 = hashlib.sha256((first / "checkpoints/last.ckpt").read_bytes()).hexdigest()
    assert built.classifier.hparams["config"]["start"]["sha256"] == sha256


def test_the_state_of_adafactor_is_smaller_than_the_weights(config, tmp_path):
    adafactor = ["~optimizer", "+optimizer={_target_: torch.optim.Adafactor, lr: 0.01}", "scheduler=constant"]
    train(config(*adafactor, "trainer.max_epochs=1", folder="first"))
    continued = [f"start.checkpoint={tmp_path}/first", "start.optimizer=true"]
    train(config(*adafactor, "trainer.max_epochs=1", *continued, folder="next"))
    states = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        for name in ("first", "next")
    ]
    assert [float(state[0]["step"]) for state in states] == [5, 10]
    assert "row_var" in states[0][0]


def test_training_images_that_become_validation_images_are_reported(config, first, capsys):
    for settings, differs in [
        ([], None),
        (["data.folds=4", "data.fold=0"], "data.folds"),
        (["data.split_seed=1"], "data.split_seed"),
    ]:
        build(config(f"start.checkpoint={first}", *settings))
        reported = f"may have been trained on validation images of this run: {differs} differs."
        assert (reported in capsys.readouterr().out) == bool(differs)


def test_the_record_names_the_last_checkpoint_with_the_optimizer_and_the_best_one_without(config, first, capsys):
    for overrides, file, state in [((), "last.ckpt", True), (["start.optimizer=false"], "best.ckpt", None)]:
        checkpoint = first / "checkpoints" / file
        start = {"checkpoint": str(checkpoint), "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
        expanded = expand(continuing(config, first, *overrides))
        assert expanded.start == start | ({"optimizer": True} if state else {})
    train(continuing(config, first))
    assert (
        f"from the weights and the state of the optimizer of {first}/checkpoints/last.ckpt\n" in capsys.readouterr().out
    )


def test_a_trained_network_continues_with_the_state_of_its_optimizer(first, tmp_path):
    chosen = ["model=trained", f"model.checkpoint={first}", "start.optimizer=true", f"output_dir={tmp_path}/tuned"]
    train(small(*chosen, "optimizer.lr=0", "callbacks.pictures=null", without="model."))
    assert_same_weights(tmp_path / "tuned/checkpoints/last.ckpt", first / "checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("optimizer=adamw", r"^start\.optimizer=true: .*no state of torch\.optim\.AdamW.*remove start\.optimizer"),
        ("+module.no_decay=true", r"^start\.optimizer=true: .*module\.no_decay"),
        ("start.checkpoint=nowhere", "nowhere: no checkpoint found"),
        ("start.checkpoint=null", r"^start=.*start\.checkpoint=RUN"),
        ("start.optimizer=maybe", r"^start\.optimizer=maybe is not valid"),
        ("+start.scheduler=true", r"^start=.*start\.optimizer=true"),
        ("model.hidden=32", r"do not fit the network"),
    ],
)
def test_a_run_that_cannot_continue_is_refused(config, first, overrides, message):
    with pytest.raises(UserError, match=message):
        train(continuing(config, first, *overrides.split()))


def test_a_checkpoint_without_the_state_of_an_optimizer_is_refused(config, changed):
    path = changed(lambda content: content.pop("optimizer_states"))
    with pytest.raises(UserError, match=r"^start\.optimizer=true: .*changed\.ckpt .*remove start\.optimizer"):
        train(config("model=trained", f"model.checkpoint={path}", "start.optimizer=true", without="model."))


def test_the_state_of_an_optimizer_is_refused_for_other_classes(finetune):
    with pytest.raises(UserError, match=r"^start\.optimizer=true: .*other classes.*Remove start\.optimizer"):
        train(finetune("start.optimizer=true"))


def test_the_refusals_of_resuming_name_a_new_run_from_the_weights(first):
    for setting in ("optimizer.lr=0.1", "trainer.max_epochs=5"):
        with pytest.raises(UserError) as error:
            resume(first, [setting])
        assert f"start.checkpoint={first} start.optimizer=true" in str(error.value)
        assert f"model=trained model.checkpoint={first}" in str(error.value)
