"""What every command shares: where configs lie, how arguments are read, how errors are told."""

import argparse
import contextlib
import errno
import functools
import logging
import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cifarnet.config import CONFIGS, PACKAGE, did_you_mean
from cifarnet.errors import Interrupted, UserError, printable


class Arguments(NamedTuple):
    """A command's: paths, settings such as `tta=mirror`, and the paths after `--against`."""

    paths: list[str]
    settings: list[str]
    against: list[str]


def parse(
    command: str, description: str, examples: str, against: bool = False, arguments: Sequence[str] | None = None
) -> Arguments:
    """Read `PATHS… key=value… [--against PATHS…]`; `--help` shows the examples and the command's settings.

    What exists is a path, whatever its name; of what does not, a setting is what has a `=` or begins with + or ~.

    Args:
        command: its name, as of its settings in `configs/<command>.yaml`.
        against: whether the command takes `--against`.
        arguments: as typed; None: those of this process.
    """
    listing = (CONFIGS / f"{command}.yaml").read_text("utf-8").splitlines()[1:]
    parser = argparse.ArgumentParser(
        usage=f"python -m cifarnet.{command} PATH… key=value…" + (" [--against PATH…]" if against else ""),
        description=description,
        epilog=f"examples:\n{examples}\nsettings:\n" + "\n".join(f"  {line}" for line in listing),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="+", metavar="PATH… key=value…", help="runs, and settings: see below")
    parser.set_defaults(against=[])
    if against:
        parser.add_argument("--against", nargs="+", metavar="PATH", help="compared with")
    given, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        key, _, value = unknown[0].lstrip("-").partition("=")
        setting = f"{key.replace('-', '_')}={value or '…'}"
        parser.error(f"{unknown[0]} is no flag. Settings have no dashes: {setting} (and a file is ./{unknown[0]})")
    settings = [argument for argument in given.arguments + given.against if is_setting(argument)]
    paths, baseline = (
        [argument for argument in of if not is_setting(argument)] for of in (given.arguments, given.against)
    )
    if not paths:
        parser.error("name a path: a run's folder")
    return Arguments(paths, settings, baseline)


def parse_one(command: str, description: str, examples: str) -> tuple[str, list[str]]:
    """The path and the settings of a command that takes one run."""
    paths, settings, _ = parse(command, description, examples)
    if len(paths) > 1:
        told = f"{len(paths)} paths are given, {', '.join(paths)}"
        raise UserError(f"{told}: {command} one run or checkpoint at a time.")
    return paths[0], settings


def is_setting(argument: str) -> bool:
    """Is it `key=value`, and no file or folder of that name?"""
    return not Path(argument).exists() and ("=" in argument or argument.startswith(("+", "~")))


def compose(command: str, settings: Sequence[str]) -> DictConfig:
    """`configs/<command>.yaml` with these overrides."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(command, list(settings))


def run_hydra(task: Callable[[DictConfig], Any], arguments: Sequence[str]) -> None:
    """What `@hydra.main` does for `python -m cifarnet.train`, with arguments that may be others than those typed."""
    from hydra._internal.utils import _run_hydra, get_args_parser

    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")  # sets the version's behaviour
    parser, failures = get_args_parser(), []

    @functools.wraps(task)  # Hydra names the run's log after its file
    def keep(config: DictConfig, **more: Any) -> Any:
        try:
            return task(config, **more)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            failures.append(error)  # of a single run Hydra would print the overrides before it raises

    parser.allow_abbrev = False  # --experiment is no --experimental-rerun
    parsed, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise UserError(f"{unknown[0]} is no flag. Settings have no dashes: +experiment=baseline optimizer.lr=0.1")
    _run_hydra(parsed, parser, keep, str(CONFIGS), "train")
    for failure in failures:
        raise failure


def key_of(override: str) -> str:
    """What an override is about: `data.root` of `+data.root=pictures`."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def value_of(key: str, arguments: Sequence[str]) -> str | None:
    """What the last `key=…` among the arguments says, without quotes; None where there is none."""
    values = [argument.partition("=")[2] for argument in arguments if key_of(argument) == key and "=" in argument]
    return values[-1].strip("'\"") if values else None


def literal(text: str) -> str:
    """Any text as an override's value, which Hydra reads as that text."""
    return QuotedString(text, Quote.single).with_quotes()


def quoted(key: str, value: str) -> str:
    """`key=value` as a shell and Hydra understand it, whatever characters the value has."""
    if re.fullmatch(r"[\w/.:-]+", value):
        return f"{key}={value}"
    return shlex.quote(f"{key}={literal(value)}")


@contextlib.contextmanager
def _raising() -> Iterator[bool]:
    """Hydra is to raise what it would print. Yields whether the user wants to see tracebacks."""
    before, logs_errors = os.environ.get("HYDRA_FULL_ERROR"), logging.raiseExceptions
    in_threads = threading.excepthook
    logging.raiseExceptions = False  # of a log on a full disk, with a traceback

    def told_here_too(arguments: threading.ExceptHookArgs) -> None:  # TensorBoard's writer passes it on
        if before == "1" or _unwritable(arguments.exc_value) is None:
            in_threads(arguments)

    threading.excepthook = told_here_too
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield before == "1"
    finally:
        logging.raiseExceptions, threading.excepthook = logs_errors, in_threads
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def run(task: Callable[[], Any]) -> None:
    """Run a command and end the process: mistakes of the user's in one message, bugs with their traceback.

    Exit status: 0, 1 for an error, 130 and 143 for a run stopped by Ctrl-C and SIGTERM. HYDRA_FULL_ERROR=1 shows
    the traceback of every error.
    """
    try:
        with _raising() as show_traceback:
            task()
    except Interrupted as interrupted:
        print(printable(str(interrupted)), file=sys.stderr)
        sys.exit(interrupted.status)
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, SystemExit) as end:
        if type(end).__name__ == "SIGTERMException":  # Lightning's, of a signal while training was being prepared
            print("\nStopped by SIGTERM, before training began: nothing is saved.", file=sys.stderr)
            sys.exit(143)
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise  # not Lightning's way of passing on a Ctrl-C
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if show_traceback or message is None:
            raise
        print(printable(f"Error: {message}"), file=sys.stderr)
        sys.exit(1)


def explain(error: BaseException) -> str | None:
    """What to tell the user, or None where the error is not known to be theirs."""
    if isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException":  # the latter is Lightning's
        return str(error)
    if (full := _unwritable(error)) is not None:
        file = full.filename or "A file"
        return f"{file} cannot be written: {full.strerror}. What was there before is kept: make room, and go on."
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"Out of memory. Choose a smaller data.batch_size or model. ({str(error).strip().partition(chr(10))[0]})"
    if isinstance(error, RecursionError):
        return f"Something in it is nested too deeply ({error})."
    if isinstance(error, InstantiationException):  # raised by a class that a config names
        cause = error.__cause__
        if cause is None or isinstance(cause, HydraException | OmegaConfBaseException):
            return " ".join(str(error).split())
        section = str(error).rpartition("full_key: ")[2]
        return explain(cause) or f"{section}: {cause}"
    if isinstance(error, OverrideParseException):
        return " ".join(f"{error.override} cannot be read: {error}".split())
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if (extra := {"joblib": "sweep", "submitit_slurm": "slurm"}.get(name)) is not None:
            return f"This launcher needs {name.partition('_')[0]}: pip install 'cifarnet[{extra}]'"
        meant = did_you_mean(name, error.options)
        return f"There is no {group}={name}.{meant} There are: {', '.join(error.options)}."
    unknown = error.__cause__ if isinstance(error, ConfigCompositionException) else None
    if isinstance(unknown, ConfigKeyError | ConfigAttributeError):
        root = OmegaConf.to_container(unknown.parent_node._get_root(), resolve=False)
        if not str(unknown.full_key).startswith("hydra"):
            root.pop("hydra", None)
        meant = did_you_mean(unknown.full_key, _keys(root) | {path.name for path in CONFIGS.glob("*/")})
        return f"{unknown.full_key} is no setting.{meant} (To add one, put a + before it.)"
    if isinstance(error, HydraException | OmegaConfBaseException):
        told = f"{error}: {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else str(error)
        return " ".join(told.split())
    if _refused_by_lightning(error):
        return " ".join(f"trainer: {error}".split())
    if _raised_by_hydra(error):
        if not isinstance(error, OSError):
            return str(error) or "Hydra cannot compose the config. In a defaults list, what is overridden comes last."
        return (
            f"The run's folder cannot be made: {error.strerror}: {error.filename}. "
            "Choose another, such as hydra.run.dir=runs/mine (in a sweep: hydra.sweep.dir)."
        )
    return None


def _keys(config: dict[Any, Any], prefix: str = "") -> set[str]:
    """All settings of a nested config, in full."""
    inner = (_keys(value, f"{prefix}{key}.") for key, value in config.items() if isinstance(value, dict))
    return {f"{prefix}{key}" for key in config}.union(*inner)


def _unwritable(error: BaseException | None) -> OSError | None:
    """The full or failing disk behind an error."""
    reasons = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO
    while error is not None and not (isinstance(error, OSError) and error.errno in reasons):
        error = error.__cause__ or error.__context__
    return error


def _refused_by_lightning(error: BaseException) -> bool:
    """A setting that Lightning looks at only when it starts."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError | TypeError) and "lightning" in Path(last.f_code.co_filename).parts


def _raised_by_hydra(error: BaseException) -> bool:
    """Before any code of a job ran: Hydra makes the run's folder itself."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    calls = [place for place, code in enumerate(frames) if code in (run_hydra.__code__, compose.__code__)]
    if not calls:
        return False  # raised in a job
    files = [Path(code.co_filename) for code in frames[calls[0] :]]
    return not any(PACKAGE in file.parents and file.name != "cli.py" for file in files)
