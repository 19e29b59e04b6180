import pytest
from omegaconf import OmegaConf

from cifarnet.cli import compose
from cifarnet.config import deciding_settings, flat, validate
from cifarnet.data import Synthetic
from cifarnet.errors import UserError


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("data.batch_size", [0, -1, 10**9]),
        ("data.eval_batch_size", [0, 10**9]),
        ("data.val_fraction", ["nan", -0.1, 1]),
        ("data.hardest_share", ["nan", 0, 1.1]),
        ("data.folds", [1, "nan"]),
        ("data.imbalance", [0.5, "nan"]),
        ("data.train_share", [0, 1.1]),
        ("data.images_per_class", [0, 1.5]),
        ("data.label_noise", [-0.1, 1]),
        ("data.split_seed", [-1, 2**70]),
        ("data.shuffle_seed", [-1, 2**32]),
        ("data.crop_padding", [-1, 10**6]),
        ("data.cutout", [-1, 10**6]),
        ("data.train_sizes", ["[]", "[0]", "[1000000]"]),
        ("data.seed", [-1, 2**64]),
        ("data.train_size", [0, 3]),
        ("data.test_size", [9, 10**7]),
        ("model.drop_rate", [-0.1, 1, "inf"]),
        ("model.widths", ["[0,4]"]),
        ("seed", [-1, 2**32]),
        ("threads", [0]),
        ("trainer.devices", [-2]),
        ("sweep.keep_checkpoints", [-1]),
        ("module.tta_share", [-0.1, 1.1]),
    ],
)
def test_numbers_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^{name}="):
            validate(compose("train", ["data=synthetic", "output_dir=run", f"{name}={value}"]))


@pytest.mark.parametrize("reference", ["${mine}", "${mine[0]}", "${oc.select:mine,3}"])
def test_settings_that_others_refer_to_can_be_added(config, reference):
    validate(config("+mine=[4]", f"+recipe.x={{_target_: builtins.dict, a: '{reference}'}}"))
    with pytest.raises(UserError, match="mines: unknown setting"):
        validate(config("+mines=[4]", "+recipe.x={_target_: builtins.dict, a: 1}"))


def test_a_valid_config_passes_and_a_wrong_type_does_not(config):
    validate(config())
    validate(config("trainer.precision=auto"))
    with pytest.raises(UserError, match=r"optimizer\.lr=fast is not valid: expected a number"):
        validate(config("optimizer.lr=fast"))


def composed(*overrides):
    return OmegaConf.to_container(compose("train", overrides))


@pytest.mark.parametrize(
    ("override", "deciding"),
    [
        ("optimizer.lr=0.3", {"optimizer.lr"}),
        ("data.flip=none", {"data.flip"}),
        ("+recipe=mixup", {"data.mix._target_", "data.mix.alpha"}),
        ("callbacks.best.monitor=val/cross_entropy", {"callbacks.best.monitor"}),
        ("seed=1", {"seed"}),
        ("data.root=elsewhere", set()),
        ("name=mine", set()),
        ("threads=1", set()),
        ("callbacks.pictures=null", set()),
        ("callbacks.last=null", set()),
        ("logger=csv", set()),
        ("sweep.keep_checkpoints=1", set()),
    ],
)
def test_settings_that_decide_the_result(override, deciding):
    before, after = deciding_settings(composed()), deciding_settings(composed(override))
    assert {key for key in {**before, **after} if before.get(key) != after.get(key)} == deciding


def test_the_number_of_threads_decides_the_time():
    before, after = (deciding_settings(composed(f"threads={n}"), times=True) for n in (1, 2))
    assert {key for key in before if before[key] != after[key]} == {"threads"}


def test_flat_settings_are_text_without_nulls():
    assert flat({"a": {"b": 1.0, "c": [1, 2], "d": None}, "e": "x", "f": False}) == {
        "a.b": "1",
        "a.c": "[1, 2]",
        "e": "x",
        "f": "false",
    }


def test_the_settings_of_a_run_are_these():
    """A new setting is added here on purpose."""

    def keys(node, prefix=""):
        for key, value in node.items():
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]

    assert sorted(keys(composed("+experiment=baseline"))) == sorted(SETTINGS.split())


def test_a_recorded_config_with_a_list_of_callbacks_is_read():
    assert deciding_settings({"callbacks": [[]], "seed": 1})["seed"] == "1"


SETTINGS = """
callbacks.best._target_ callbacks.best.dirpath callbacks.best.enable_version_counter callbacks.best.filename
callbacks.best.mode callbacks.best.monitor callbacks.history._target_ callbacks.last._target_ callbacks.last.dirpath
callbacks.last.enable_version_counter callbacks.last.filename callbacks.nan._target_ callbacks.pictures._target_
callbacks.progress._target_ callbacks.stop._target_
channels_last
ckpt_path
classes
compile
data._target_ data.batch_size data.crop_padding data.cutout data.eval_batch_size data.flip data.fold data.folds
data.hardest_share data.images_per_class data.imbalance data.keep data.label_noise data.labels data.mix
data.noise_type data.on_device data.root data.sampler data.shuffle_seed data.split_seed data.train_share
data.train_sizes data.transforms data.url data.val_fraction
keep_freed_memory
logger.tensorboard._target_ logger.tensorboard.default_hp_metric logger.tensorboard.name
logger.tensorboard.save_dir logger.tensorboard.version
model._target_ model.drop_rate model.hidden model.widths
module._target_ module.tta module.tta_share
name
objective._target_ objective.label_smoothing objective.reduction objective.weight
optimizer._target_ optimizer.fused optimizer.lr optimizer.momentum optimizer.nesterov optimizer.weight_decay
output_dir
recipe
scheduler._target_ scheduler.cycle_momentum scheduler.max_lr scheduler.pct_start scheduler.total_steps
seed
start.checkpoint
start.optimizer
sweep.keep_checkpoints sweep.resume sweep.stop_at_failure
threads
total_steps
trainer._target_ trainer.accelerator trainer.deterministic trainer.devices trainer.max_epochs trainer.precision
trainer.strategy
"""


def test_a_library_that_is_not_installed_is_named():
    with pytest.raises(UserError, match=r"no such class or function\. The package nowhere is not installed"):
        validate(compose("train", ["optimizer._target_=nowhere.Lion", "output_dir=run"]))


@pytest.mark.parametrize(
    "settings", [{"val_fraction": 0.9}, {"val_fraction": 0.1}, {"cutout": 33}, {"crop_padding": 32}]
)
def test_the_value_that_a_message_proposes_works(settings):
    with pytest.raises(UserError) as error:
        assert Synthetic(train_size=20, test_size=20, **settings).source
    name, value = str(error.value).rpartition("data.")[2].split()[0].rstrip(".").split("=")
    proposed = {"val_fraction": 0, name: int(value)}
    assert Synthetic(train_size=20, test_size=20, **proposed).source
