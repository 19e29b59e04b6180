"""Going on with a run, with the settings that its checkpoint recorded."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from cifarnet import checkpoint, cli
from cifarnet.allowlist import locate
from cifarnet.build import Built
from cifarnet.config import CONFIGS, PLACES, SHOWN, SPEED, within
from cifarnet.errors import UserError, printable
from cifarnet.system import distributed, files

# no weight depends on these, but by rounding
ROUNDING = {"trainer.precision", "compile", "channels_last", "module.tta", "module.tta_share"}
ALLOWED = (PLACES - {"output_dir", "sweep", "ckpt_path", "name"}) | SHOWN | SPEED | ROUNDING
# where a file of configs/ may be chosen anew, and what of it is taken
CHOICES = {
    "logger": ["logger"],
    "trainer": ["trainer.accelerator", "trainer.devices", "trainer.strategy", "channels_last"],
}
PLAN = "trainer.max_epochs"


def last_checkpoint(path: str | Path) -> Path:
    """A run's folder stands for its last checkpoint; a file for itself."""
    path = Path(path)
    return path / "checkpoints" / "last.ckpt" if path.is_dir() else path


def resume(path: str | Path, overrides: Sequence[str] = ()) -> tuple[DictConfig, Path]:
    """The config of the run that a checkpoint belongs to, and the checkpoint to go on from.

    Args:
        path: a run's folder, or its last.ckpt.
        overrides: of settings on which no weight depends, such as "data.root=pictures", and of trainer.max_epochs,
            where the schedule does not depend on it.

    Raises:
        UserError: no such checkpoint, one that asks for classes that it may not, or another override.
    """
    path = last_checkpoint(path)
    content = checkpoint.read(path)
    _check_whole(content, path)
    given = _parsed(overrides)
    allowed = next((override.value() for override in given if override.key_or_group == "classes"), [])
    written = content["hyper_parameters"]["config"] | {"output_dir": str(_folder(path))}
    # a stranger's, or of no more use, or given anew
    for key in ["data.url", "model.checkpoint", *(override.key_or_group for override in given)]:
        _forget(written, key)
    checked = checkpoint.checked(written, path, locate(allowed))
    recorded = OmegaConf.create(checked | {"logger": _own_loggers(checked.get("logger"))})
    config = _changed(recorded, given)
    _check_plan(recorded, config)
    return config, path


def _check_whole(content: dict[str, Any], path: Path) -> None:
    """Lightning goes on without some parts, and so from another place."""
    parts: dict[str, Any] = dict.fromkeys(("loops", "callbacks", "middle_of_epoch"), dict)
    parts |= {"optimizer_states": list, "lr_schedulers": list}
    config = content["hyper_parameters"]["config"]
    scheduled = bool(config.get("scheduler"))
    if not isinstance(config.get("trainer"), dict):
        raise UserError(f"{path} is damaged: its config has no trainer. Try best.ckpt, or train anew.")
    for part, kind in parts.items():
        value = content.get(part)
        if not isinstance(value, kind) or not (value or (part == "lr_schedulers" and not scheduled)):
            raise UserError(f"{path} is damaged: what it says of {part} cannot be used. Try best.ckpt, or train anew.")


def _forget(config: dict[str, Any], key: str) -> None:
    """Set a setting to null where there is one."""
    *sections, name = key.split(".")
    for section in sections:
        config = config.get(section) or {}
    if name in config and key not in (PLAN, "trainer"):
        config[name] = None


def _own_loggers(recorded: Any) -> dict[str, Any] | None:
    """This project's settings for the loggers that a checkpoint names: no address or account comes from there."""
    if not recorded or not isinstance(recorded, dict):
        return None
    own = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, CONFIGS.glob("logger/*.yaml"))))
    kept, left_out = {}, []
    parts = recorded.items() if "_target_" not in recorded else [(recorded["_target_"], recorded)]
    for name, logger in parts:
        asked = logger if isinstance(logger, dict) else {}
        ours = {key: settings for key, settings in own.items() if settings["_target_"] == asked.get("_target_")}
        kept |= ours
        same = dict(*ours.values())
        left_out += [f"logger.{name}.{key}" for key, value in asked.items() if value not in (None, same.get(key))]
    if left_out:
        print(printable(f"Not taken from the checkpoint: {', '.join(left_out)}. Give them in the command."), flush=True)
    return kept


def _folder(path: Path) -> Path:
    """The run's own, or a new one for a checkpoint that was moved out of it."""
    if path.parent.name == "checkpoints":
        files.refuse_links(path.parent.parent)
        return path.resolve().parent.parent
    return Path("lightning_logs", "resumed", f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}").resolve()


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """The overrides, if no weight depends on them."""
    if flags := [override for override in overrides if override.startswith("-")]:
        raise UserError(f"ckpt_path=… goes on with one run, as it was recorded: leave out {' '.join(flags)}.")
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:
        key = override.key_or_group
        if key in CHOICES and (override.is_delete() or _chooses(override)):
            continue
        if override.is_delete() or override.is_sweep_override() or not (key == PLAN or within(key, ALLOWED)):
            raise UserError(
                f"{override.input_line}: a run goes on with the settings it began with. Only what no weight depends on "
                f"may be given, such as data.root, threads, logger, trainer.precision or module.tta; {PLAN} too, where "
                "the schedule does not depend on it. Leave it out, or train anew without ckpt_path."
            )
    return parsed


def _chooses(override: Override) -> bool:
    """Does it name files of configs/: one, or several?"""
    return isinstance(override.value(), str | list)


def _changed(recorded: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """A copy of the recorded config with the overrides in it."""
    config = recorded.copy()
    config.classes = []  # what a checkpoint may ask for is said in the command, not in the checkpoint
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key in CHOICES and override.is_delete():
            config[key] = None
        elif key in CHOICES and _chooses(override):
            chosen = cli.compose("train", [str(override.input_line)])
            for part in CHOICES[key]:
                OmegaConf.update(config, part, OmegaConf.select(chosen, part))
        else:
            OmegaConf.update(config, key, value, force_add=True)
    return config


def _check_plan(recorded: DictConfig, config: DictConfig) -> None:
    """Refuse another number of epochs where the learning rates were planned for the recorded one."""
    planned, asked = recorded.trainer.max_epochs, config.trainer.max_epochs
    schedule = OmegaConf.to_container(recorded).get("scheduler") or {}
    if asked != planned and re.search(r"\$\{(total_steps|trainer\.max_epochs)\}", str(schedule)):
        raise UserError(
            f"{PLAN}={asked}: the schedule {str(schedule['_target_']).rpartition('.')[2]} was planned for {planned} "
            f"epochs. Leave {PLAN} as it was, or train anew; a run with scheduler=constant may be given more."
        )


def check_same_images(ckpt_path: str | Path, built: Built) -> None:
    """Refuse to go on with other images than the run began with."""
    before, now = checkpoint.read(ckpt_path)["hyper_parameters"], built.classifier.hparams
    for what in ("class_names", "image_size", "images"):
        if before[what] != now[what]:
            raise UserError(
                f"{ckpt_path} was trained on other images: {what} was {before[what]}, now {now[what]}. "
                "Give data.root=… where they lie, or train anew without ckpt_path."
            )


class Resume(Callback):
    """A run's checkpoints are where its folder is now, wherever its checkpoint says that they were."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.started = path, False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = True

    @contextlib.contextmanager
    def blamed_for_errors(self) -> Iterator[None]:
        """What goes wrong while a checkpoint is restored is its fault: Lightning raises whatever type comes."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if self.started or isinstance(error, UserError) or distributed.is_lost(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"{self.path} is damaged, or what it is to go on with has changed since ({reason}). Train anew, or try "
                "another checkpoint of that run."
            ) from error

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else ""

        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                paths = ("best_model_path", "kth_best_model_path", "last_model_path")
                state |= {"dirpath": str(folder), **{name: here(state.get(name, "")) for name in paths}}
                state["best_k_models"] = {here(path): score for path, score in state["best_k_models"].items()}
