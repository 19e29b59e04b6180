"""The checks of a sweep, its record `multirun.yaml`, from which it is resumed, and its stop file.

Resuming reuses the recorded overrides, which can run code: resume only your own sweeps.
"""

import argparse
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.allowlist import leaves, refuse_foreign_classes
from cifarnet.config import SweepSettings, effect, is_in
from cifarnet.errors import UserError
from cifarnet.schema import check_settings
from cifarnet.system import files

RECORD = "multirun.yaml"
CONTROLS = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
LAYOUT = {  # a sweep is reported and resumed by the numbers of its jobs, which are the names of their folders
    "hydra.sweep.subdir": "${hydra.job.num}",
    "hydra.output_subdir": ".hydra",
    "output_dir": "${hydra:runtime.output_dir}",
}
FIXED = (  # these cannot be changed when resuming
    *("hydra.mode", "hydra.sweep.dir", "name", "output_dir", "ckpt_path"),
    *("hydra.sweeper.zip", "hydra.sweeper.params"),  # they determine the jobs
)


def check(config: DictConfig, keys: Collection[str]) -> None:
    """Check the settings of a sweep before any job runs.

    Args:
        keys: the settings that the sweep varies.

    Raises:
        UserError: a setting is wrong, or there are no validation images for choosing the best settings.
    """
    check_settings(config.sweep, SweepSettings, "sweep.")
    folder = Path(config.hydra.sweep.dir)
    launcher = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    for key, text in leaves({"hydra.launcher": launcher, "hydra.sweep.dir": os.path.abspath(folder)}):
        setting, problem = f"{key}={text}", "contains a control character, which launchers could pass to a shell"
        if re.search(CONTROLS, setting):  # in sbatch's script, the rest of a broken line would run as a command
            raise UserError(f"{setting!r} {problem}. Remove it. (It may come from name.)")
    files.refuse_links(folder, folder.glob("*"))  # such as a study.journal, to which a search would append
    written = dict(leaves(OmegaConf.to_container(config, resolve=False)))
    for key, expected in LAYOUT.items():
        if key in keys or written.get(key) != expected:
            problem = f"{key}={written.get(key)}: a sweep is resumed by its jobs' folders, which are named 0, 1, 2, …"
            raise UserError(f"{problem} Remove {key}. (sweep.csv lists the settings of each folder.)")
    chosen = [key for key in keys if key != "seed"]
    has_folds = config.data.get("folds") is not None or "data.folds" in keys
    if chosen and config.data.get("val_fraction") == 0 and not has_folds:
        from cifarnet.build import make_data

        if not make_data(config).validates:
            problem = f"Sweeping {', '.join(chosen)} with data.val_fraction=0 would choose settings by test accuracy"
            raise UserError(f"{problem}. Set data.val_fraction=0.1. (A sweep over only the seed does not need it.)")


def begin(config: DictConfig, folder: Path) -> None:
    """Write the record of a sweep that starts or resumes, and remove its stop file."""
    stop_file(folder).unlink(missing_ok=True)
    files.write(folder / RECORD, OmegaConf.to_yaml(config))


def fix_folder(folder: Path) -> list[str]:
    """Return the overrides that put a job into the folder of its sweep, even if the job's settings change it, such as a
    job's `name` or experiment."""
    subfolders = ["hydra.sweep.subdir=${hydra.job.num}", "hydra.output_subdir=.hydra"]
    return [f"hydra.sweep.dir={cli.literal(str(folder))}", *subfolders]


def stop_file(folder: Path) -> Path:
    """Return the path of the stop file. While it exists, no further jobs of the sweep start."""
    return folder / "stop"


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command that resumes the sweep in the folder of `sweep.resume=<folder>`.

    Args:
        arguments: the arguments of the command line: `sweep.resume`, `--config-dir`, and overrides that do not affect
            results, which replace the recorded overrides.

    Raises:
        UserError: the folder contains no sweep, an override affects results, or the sweep names a class that is not
            allowed.
    """
    folder = Path(cli.value_of("sweep.resume", arguments) or ".")
    files.refuse_links(folder)
    recorded, params = _recorded_overrides(folder)
    flag_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flag_parser.add_argument("--multirun", "-m", action="store_true")
    flag_parser.add_argument("--config-dir", "-cd", default="")
    flags, others = flag_parser.parse_known_args(list(arguments))
    overrides = [override for override in others if cli.key_of(override) != "sweep.resume"]
    if refused := [override for override in overrides if not _can_change(cli.key_of(override))]:
        problem = f"sweep.resume={folder} uses the settings of that sweep. Remove {' '.join(refused)}"
        raise UserError(f"{problem}: only settings that do not affect results can be changed.")
    keys = {"hydra.sweep.dir", "sweep.resume", *map(cli.key_of, overrides)}
    kept = [override for override in recorded if cli.key_of(override) not in keys]
    if "hydra/launcher" in keys:  # the recorded settings belong to another launcher
        kept = [override for override in kept if not override.startswith("hydra.launcher.")]
    allowed = (cli.value_of("classes", arguments) or "").strip("[]").replace(" ", "").split(",")
    parser = OverridesParser.create()
    for override in parser.parse_overrides([*kept, *params]):
        name, is_choice = override.key_or_group.rpartition(".")[2], isinstance(override.value(), ChoiceSweep)
        if override.is_sweep_override() and not is_choice:  # a sweep over numbers or config files
            continue
        for text in override.sweep_string_iterator() if is_choice else [override.get_value_element_as_str()]:
            refuse_foreign_classes({name: parser.parse_override(f"{name}={text}").value()}, folder / RECORD, allowed)
    quoted = cli.literal(str(folder))
    config_dir = [f"--config-dir={flags.config_dir}"] if flags.config_dir else []
    return ["--multirun", *config_dir, *kept, *overrides, f"hydra.sweep.dir={quoted}", f"sweep.resume={quoted}"]


def _can_change(key: str) -> bool:
    """Whether a setting can be changed when a sweep is resumed."""
    is_hydras = key.startswith(("hydra.", "hydra/"))
    return not is_in(key, FIXED) and (is_hydras or key == "model.checkpoint" or effect(key) in ("nothing", "speed"))


def _recorded_overrides(folder: Path) -> tuple[list[str], list[str]]:
    """Return the overrides of the command that started a sweep, and those in the config of its sweeper."""
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"{path} is missing. Set sweep.resume to the folder of a sweep, …/multirun_<date_time>.")

    def parse(text: str) -> tuple[list[str], list[str]]:
        recorded = yaml.safe_load(text)["hydra"]
        overrides, params = recorded["overrides"], recorded["sweeper"].get("params") or {}
        return [*overrides["hydra"], *overrides["task"]], [f"{key}={value}" for key, value in params.items()]

    return files.read(path, parse, ". Start the sweep again")
