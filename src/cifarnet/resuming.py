"""Resume a run with its recorded config. A config can run code: resume only your own runs."""

import os
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.allowlist import leaves, locate, refuse_foreign_classes
from cifarnet.checkpoint import Checkpoint
from cifarnet.config import effect, is_in
from cifarnet.errors import UserError
from cifarnet.schema import accepts, has_target
from cifarnet.system import files
from cifarnet.system.hardware import cores

FIXED = {"name", "output_dir", "ckpt_path", "sweep"}  # the run keeps its folder
READ = ("data.", "model.", "module.", "start.", "sweep.")  # the run only reads the paths in these sections
IS_PATH = re.compile(r"(^|[._])(dir|dirpath|path|folder|root|location|uri)$")  # at the end of a key
SERVER = re.compile("(https?|postgresql|mysql|databricks|s3|gs)://")
COUNTS = ("trainer.devices", "trainer.num_nodes", "threads", "data.workers")  # of processes and threads
GROUPS = {  # another file in these groups of configs/ can be chosen; it sets these keys
    "logger": ["logger"],
    "trainer": ["trainer.accelerator", "trainer.devices", "trainer.strategy", "channels_last"],
}


def resume(path: str | Path, overrides: Sequence[str] = ()) -> tuple[DictConfig, Checkpoint]:
    """Return the config of the run that a checkpoint belongs to, and the checkpoint to resume from.

    Args:
        path: a run's folder, whose last.ckpt is used, or a checkpoint file.
        overrides: settings that do not affect the weights, such as "data.root=pictures", and `trainer.max_epochs` if
            the schedule does not depend on it.

    Raises:
        UserError: the checkpoint does not exist or names a forbidden class, or an override affects the weights.
    """
    checkpoint = Checkpoint.open(path, last=True)
    if "optimizer_states" not in checkpoint.content:
        raise UserError(f"{path} contains no training state: use it with model=trained model.checkpoint={path}.")
    parsed = _parse(overrides, path)
    allowed: Any = next((override.value() for override in parsed if override.key_or_group == "classes"), [])
    written = checkpoint.content["hyper_parameters"]["config"]
    refuse_foreign_classes(written, checkpoint.path, list(map(str, allowed)))
    recorded: Any = _without_downloads(written) | {"output_dir": str(_folder(checkpoint)), "classes": []}
    overridden = [key for override in parsed for key in GROUPS.get(override.key_or_group, [override.key_or_group])]
    _check(recorded, checkpoint.path, overridden, _evaluates)
    _check_size(recorded, checkpoint.path)
    recorded = OmegaConf.create(recorded)
    make_read_only(recorded)
    config = _with_overrides(recorded, parsed)
    resolved = OmegaConf.to_container(config, resolve=True)
    _check(resolved, checkpoint.path, overridden, partial(_reaches_out, Path(config.output_dir)))
    _check_max_epochs(recorded, config, path)
    return config, checkpoint


def _without_downloads(node: Any) -> Any:
    """Return a nested config in which networks of libraries download no weights; the checkpoint has the weights."""
    if isinstance(node, list | tuple):
        return [_without_downloads(member) for member in node]
    if not isinstance(node, dict):
        return node
    is_librarys = str(node.get("_target_")).startswith(("timm.", "torchvision."))
    downloads = {"pretrained", "weights", "weights_backbone"} if is_librarys else set()
    return {key: None if key in downloads else _without_downloads(value) for key, value in node.items()}


def make_read_only(config: DictConfig) -> None:
    """Set `data.read_only`, if the data set has this setting: only the user's command may download."""
    if has_target(config.get("data")) and accepts(locate([config.data._target_])[0], "read_only"):
        OmegaConf.update(config, "data.read_only", True, force_add=True)


def _folder(checkpoint: Checkpoint) -> Path:
    """Return the run's folder, or a new folder for a checkpoint file outside a run."""
    if checkpoint.run_folder is not None:
        files.refuse_links(checkpoint.run_folder)
        return checkpoint.run_folder.resolve()
    return Path("lightning_logs", "resumed", f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}").resolve()


def _check(config: Any, file: Path, overridden: Sequence[str], problem_of: Callable[[str, str], str]) -> None:
    """Check all settings of a recorded config, except for those that the command replaces.

    Args:
        problem_of: returns what is wrong with a setting (a key and its value as text), or "".

    Raises:
        UserError: a setting must be replaced in the command.
    """
    for key, text in leaves(config):
        if not is_in(key, overridden) and (problem := problem_of(key, text)):
            raise UserError(f"{file}: the recorded setting {key}={text[:200]} {problem}. Set {key}=… in the command.")


def _evaluates(key: str, text: str) -> str:
    """Return a problem if `${…}` does more than refer to another setting, such as ${oc.env:TOKEN}."""
    return "could read this machine's environment" if "${" in re.sub(r"(?<!\\)\$\{[\w.-]+\}", "", text) else ""


def _reaches_out(folder: Path, key: str, text: str) -> str:
    """Return a problem if a setting names a path outside the run's folder, or starts too many processes or threads."""
    limit = max(64, cores())
    if is_in(key, COUNTS) and any(int(number) > limit for number in re.findall(r"\d{1,18}", text)):
        return f"exceeds {limit}"
    if key.startswith(READ) or (key.startswith("logger.") and SERVER.match(text)):
        return ""
    reads_objects = "filename" in key and "[" in text  # a format that reads attributes of objects
    start = Path.cwd() if IS_PATH.search(key) else folder
    path = Path(os.path.normpath(start / os.path.expanduser(re.sub(r"^(\w{2,}:)?/+", "/", text))))
    is_below = path.is_relative_to(folder)  # the folder has no links that leave it
    return "" if is_below and not reads_objects else "names a path outside the run's folder"


def _check_size(config: Any, file: Path) -> None:
    """Check that the references `${…}` in a recorded config do not multiply its size.

    Raises:
        UserError: they do.
    """
    texts = dict(leaves(config))
    referring = [key for key, text in texts.items() if "${" in text]
    references = re.findall(r"\$\{([\w.-]+)", " ".join(texts.values()))
    nested = [name for name in references if name[0] == "." or any(is_in(key, [name]) for key in referring)]
    if len(nested) > 10 or len(references) * max(map(len, texts.values())) > 10**7:
        raise UserError(f"{file}: the recorded settings refer to each other too often. Use another checkpoint.")


def _parse(overrides: Sequence[str], path: str | Path) -> list[Override]:
    """Parse overrides, and check that they do not affect the weights."""
    if flags := [override for override in overrides if override.startswith("-")]:
        raise UserError(f"ckpt_path=… resumes one run: remove {' '.join(flags)}.")
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:
        key = override.key_or_group
        if key in GROUPS and (override.is_delete() or _is_choice(override)):
            continue
        is_output = IS_PATH.search(key) is not None and not key.startswith(READ)
        is_free = (effect(key) != "result" or is_output) and key.partition(".")[0] not in FIXED
        is_allowed = key == "trainer.max_epochs" or is_free
        if override.is_delete() or override.is_sweep_override() or not is_allowed:
            raise UserError(
                f"{override.input_line}: when you resume a run, you can change only settings that do not affect the "
                "weights, such as data.root, threads, logger, trainer.precision or module.tta, and trainer.max_epochs "
                f"if the schedule does not depend on it. Remove the setting, or {_start_from(path)}"
            )
    return parsed


def _is_choice(override: Override) -> bool:
    """Return whether an override names one or more files of a group in configs/."""
    return isinstance(override.value(), str | list)


def _with_overrides(recorded: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """Return a copy of the recorded config with the overrides."""
    config = recorded.copy()
    for override in overrides:
        key = override.key_or_group
        if key in GROUPS and override.is_delete():
            config[key] = None
        elif key in GROUPS and _is_choice(override):
            chosen = cli.compose("train", [str(override.input_line)])
            for part in GROUPS[key]:
                OmegaConf.update(config, part, OmegaConf.select(chosen, part), merge=False)
        else:
            OmegaConf.update(config, key, override.value(), force_add=True)
    return config


def _start_from(path: str | Path) -> str:
    """Return the part of a message that says how a new run continues from a checkpoint with other settings."""
    start, model = (cli.quoted(f"{section}.checkpoint", str(path)) for section in ("start", "model"))
    return (
        f"start a new run: +experiment=… {start} start.optimizer=true (from its weights and optimizer state), "
        f"or model=trained {model} (from its weights)."
    )


def _check_max_epochs(recorded: DictConfig, config: DictConfig, path: str | Path) -> None:
    """Check that the number of epochs is unchanged if the learning-rate schedule depends on it."""
    schedule: Any = OmegaConf.to_container(recorded, resolve=False)
    schedule = schedule.get("scheduler") or {}
    depends = re.search(r"\$\{(total_steps|trainer\.max_epochs)\}", str(schedule))
    if depends and config.trainer.max_epochs != recorded.trainer.max_epochs:
        raise UserError(
            f"trainer.max_epochs={config.trainer.max_epochs}: the schedule {schedule['_target_']} was planned for "
            f"{recorded.trainer.max_epochs} epochs. Remove the setting (only a run with scheduler=constant can be "
            f"extended), or {_start_from(path)}"
        )
