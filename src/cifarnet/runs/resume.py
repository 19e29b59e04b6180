"""Going on with a run, with the settings that its checkpoint recorded."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.errors import UserError
from cifarnet.permitted import located
from cifarnet.settings import PLACES, SHOWN, SPEED, within

# no weight depends on these, but by rounding
ALLOWED = PLACES | SHOWN | SPEED | {"trainer.precision", "compile", "channels_last", "module.tta", "module.tta_share"}
CHOICES = {"logger", "trainer"}  # where a file of configs/ may be chosen anew
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
    from cifarnet import checkpoint

    path = last_checkpoint(path)
    content = checkpoint.read(path)
    recorded = OmegaConf.create(content["hyper_parameters"]["config"])
    config = _changed(recorded, overrides)
    config.output_dir = str(_folder(path))
    checkpoint.check_targets(OmegaConf.to_container(config), path, located(config.get("classes") or []))
    _check_plan(recorded, config)
    return config, path


def _folder(path: Path) -> Path:
    """The run's own, or a new one for a checkpoint that was moved out of it."""
    if path.parent.name == "checkpoints":
        return path.resolve().parent.parent
    return Path("lightning_logs", "resumed", f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}").resolve()


def _changed(recorded: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A copy of the recorded config with the overrides in it."""
    if flags := [override for override in overrides if override.startswith("-")]:
        raise UserError(f"ckpt_path=… goes on with one run, as it was recorded: leave out {' '.join(flags)}.")
    config = recorded.copy()
    config.classes = []  # what a checkpoint may ask for is said in the command, not in the checkpoint
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if key in CHOICES and (override.is_delete() or isinstance(value, str)):
            chosen = None if override.is_delete() else cli.compose("train", [str(override.input_line)])[key]
            if key == "trainer" and chosen is not None:
                config.trainer.accelerator = chosen.accelerator
            else:
                config[key] = chosen
        elif override.is_delete() or override.is_sweep_override() or not (key == PLAN or within(key, ALLOWED)):
            raise UserError(
                f"{override.input_line}: a run goes on with the settings it began with. Only what no weight depends on "
                f"may be given, such as data.root, threads, logger, trainer.precision or module.tta; {PLAN} too, where "
                "the schedule does not depend on it. Leave it out, or train anew without ckpt_path."
            )
        else:
            OmegaConf.update(config, key, value, force_add=True)
    return config


def _check_plan(recorded: DictConfig, config: DictConfig) -> None:
    """Refuse another number of epochs where the learning rates were planned for the recorded one."""
    planned, asked = recorded.trainer.max_epochs, config.trainer.max_epochs
    schedule = OmegaConf.to_container(recorded).get("scheduler") or {}
    ends = {"total_steps", "total_iters", "T_max"} & set(schedule)  # version 0.1 wrote numbers there
    if asked != planned and (ends or "${total_steps}" in str(schedule)):
        raise UserError(
            f"{PLAN}={asked}: the schedule {str(schedule['_target_']).rpartition('.')[2]} was planned for {planned} "
            f"epochs. Leave {PLAN} as it was, or train anew; a run with scheduler=constant may be given more."
        )
