"""Functions that all commands use: they read arguments, compose a config, and report errors."""

import argparse
import contextlib
import errno
import logging
import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cifarnet import trained
from cifarnet.config import CONFIGS
from cifarnet.errors import Interrupted, MachineFault, UserError, causes, printable
from cifarnet.schema import did_you_mean
from cifarnet.system.distributed import MACHINE_FAULT, report_to_launcher
from cifarnet.system.files import DISK_ERRORS
from cifarnet.system.output import optional_output

# packages and their extras
EXTRAS = {"joblib": "sweep", "submitit": "slurm", "optuna": "search", "gradio": "demo"}
EXTRAS |= {"sklearn": "features", "pyautoattack": "attack", "cleanlab": "audit"}


class Arguments(NamedTuple):
    """The arguments of a command: paths, settings such as `tta=mirror`, and the paths after `--against`."""

    paths: list[str]
    settings: list[str]
    against: list[str]


def parse(command: str, description: str | None, against: bool = False) -> Arguments:
    """Parse `PATH… key=value… [--against PATH…]`; `--help` shows the description and the settings of the command.

    The path of an existing file or folder is a path. Any other argument is a setting if it contains `=`, or starts
    with + or ~.

    Args:
        command: the name of the command, whose settings are in `configs/<command>.yaml`.
        against: whether the command accepts `--against`.
    """
    settings = (CONFIGS / f"{command}.yaml").read_text("utf-8").splitlines()[1:]
    by_name = command not in ("audit", "compare")
    networks = f"\n\ntrained networks (use a name in place of a run's folder): {', '.join(trained.names())}" * by_name
    parser = argparse.ArgumentParser(
        usage=f"python -m cifarnet.{command} PATH… key=value…" + (" [--against PATH…]" if against else ""),
        description=description,
        epilog="settings:\n" + "\n".join(f"  {line}" for line in settings) + networks,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="+", metavar="PATH… key=value…", help="paths and settings (see below)")
    parser.set_defaults(against=[])
    if against:
        parser.add_argument("--against", nargs="+", metavar="PATH", help="the runs to compare with")
    parsed, unknown = parser.parse_known_intermixed_args()
    if unknown:
        key, _, value = unknown[0].lstrip("-").partition("=")
        setting = f"{key.replace('-', '_')}={value or '…'}"
        parser.error(f"unknown option {unknown[0]}. Write settings without dashes: {setting} (files: ./{unknown[0]})")
    paths = [argument for argument in parsed.arguments if not is_setting(argument)]
    if not paths:
        parser.error("a path is required: the folder of a run" + ", or the name of a trained network" * by_name)
    return Arguments(
        paths,
        [argument for argument in parsed.arguments + parsed.against if is_setting(argument)],
        [argument for argument in parsed.against if not is_setting(argument)],
    )


def parse_one(command: str, description: str | None) -> tuple[str, list[str]]:
    """Parse the arguments of a command that takes one run, and return its path and the settings."""
    paths, settings, _ = parse(command, description)
    if len(paths) > 1:
        found = f"{len(paths)}: {', '.join(paths)}"
        raise UserError(f"{command} takes one run or checkpoint, but got {found}. Give only one.")
    return paths[0], settings


def is_setting(argument: str) -> bool:
    """Return whether an argument is a setting, and not the path of an existing file or folder."""
    return not os.path.exists(argument) and ("=" in argument or argument.startswith(("+", "~")))


def compose(command: str, settings: Sequence[str]) -> DictConfig:
    """Compose `configs/<command>.yaml` with these overrides. A run gets a new folder, unless they set `output_dir`."""
    if command in ("train", "inspect"):  # as `hydra.run.dir` in their files
        folder = f"{'inspect_' * (command == 'inspect')}{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
        settings = [f"output_dir=lightning_logs/${{name}}/{folder}", *settings]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(command, list(settings))


def check_keys(command: str, config: DictConfig) -> None:
    """Check that a composed config has the settings of its command, and no other ones.

    Raises:
        UserError: an override has added or removed a setting.
    """
    known = {"data", *compose(command, [])}
    for key in map(str, config):
        if key not in known:
            raise UserError(f"{key}: unknown setting.{did_you_mean(key, known)} --help lists the settings.")
    if missing := sorted(known - {"data", *config}):
        raise UserError(f"{missing[0]} cannot be removed. Set it to a value: {missing[0]}=…")


def key_of(override: str) -> str:
    """Return the key of an override: `data.root` for `+data.root=pictures`."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def value_of(key: str, arguments: Sequence[str]) -> str | None:
    """Return the value of the last `key=value` among the arguments, or None; quotes are read as Hydra reads them."""
    values = [argument.partition("=")[2] for argument in arguments if key_of(argument) == key and "=" in argument]
    if not values or values[-1][:1] not in ("'", '"'):
        return values[-1] if values else None
    value = OverridesParser.create().parse_override(f"{key}={values[-1]}").value()
    return str(value).replace(r"\${", "${")


def literal(text: str) -> str:
    """Quote any text as the value of an override, so that Hydra reads it as that text."""
    return QuotedString(text, Quote.single).with_quotes().replace("${", r"\${")


def quoted(key: str, value: str) -> str:
    """Return `key=value`, quoted for the shell and for Hydra if necessary."""
    if re.fullmatch(r"[\w/.:-]+", value):
        return f"{key}={value}"
    return shlex.quote(f"{key}={literal(value)}")


def without_resolvers(config: DictConfig, *kept: str) -> dict[str, Any]:
    """Return a config as plain data for another process: `${hydra:…}`, `${now:…}` and other resolvers are replaced with
    their values; `${key}` is kept. In the sections `kept`, only `${hydra:…}` and `${now:…}` are replaced."""

    def plain(parent: Any, key: Any, raw: Any, keeps: bool = False) -> Any:
        if isinstance(raw, dict):
            return {name: plain(parent[key], name, value, keeps or name in kept) for name, value in raw.items()}
        if isinstance(raw, list):
            return [plain(parent[key], place, value, keeps) for place, value in enumerate(raw)]
        resolvers = set(re.findall(r"\$\{(\w[\w.]*):", str(raw)))
        if resolvers and "total_steps" not in str(raw) and (not keeps or resolvers <= {"hydra", "now"}):
            value = parent[key]
            if isinstance(value, str):
                return value.replace("${", r"\${")  # a value is not resolved again
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        return raw

    written: Any = OmegaConf.to_container(config, resolve=False)
    return plain({"": config}, "", written)


@contextlib.contextmanager
def _raise_errors() -> Iterator[bool]:
    """Make Hydra raise the errors that it would print. Yield whether the user wants to see tracebacks."""
    previous, raise_exceptions, hook = os.environ.get("HYDRA_FULL_ERROR"), logging.raiseExceptions, threading.excepthook
    logging.raiseExceptions = False  # no traceback from logging on a full disk

    def report_in_thread(arguments: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer raises the errors of its thread in the main thread as well
        if previous == "1" or not isinstance(arguments.exc_value, OSError):
            hook(arguments)

    threading.excepthook = report_in_thread
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield previous == "1"
    finally:
        logging.raiseExceptions, threading.excepthook = raise_exceptions, hook
        del os.environ["HYDRA_FULL_ERROR"]
        if previous is not None:
            os.environ["HYDRA_FULL_ERROR"] = previous


@optional_output()
def run(task: Callable[[], Any]) -> None:
    """Run a command and end the process. User errors are reported in one message, bugs with a traceback.

    Exit status: 0; 1 for an error; 130, 143 or 140 for a run that was stopped by Ctrl-C, SIGTERM or SIGUSR2. With
    HYDRA_FULL_ERROR=1, every error is shown with its traceback.
    """
    try:
        with _raise_errors() as show_traceback:
            try:
                task()
            finally:
                sys.stdout.flush()  # reports a full disk here
    except Interrupted as interrupted:
        _end(str(interrupted), interrupted.status)
    except (KeyboardInterrupt, SystemExit) as end:
        if _is_instance(end, "lightning.pytorch.utilities.exceptions", "SIGTERMException"):
            _end("\nStopped by SIGTERM before training began; nothing was saved.", 143)
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise  # otherwise, Lightning has converted a Ctrl-C into SystemExit
        _end("\nInterrupted.", 130)
    except Exception as error:
        message = explain(error)
        if show_traceback or message is None:
            if not report_to_launcher(traceback.format_exc(), is_bug=True):
                raise
        elif not report_to_launcher(message, MACHINE_FAULT if is_machine_fault(error) else 1):
            print(printable(f"Error: {message}"), file=sys.stderr)
        sys.exit(1)


def _end(message: str, status: int) -> NoReturn:
    if not report_to_launcher(message, status):
        print(printable(message), file=sys.stderr)
    sys.exit(status)


def explain(error: BaseException) -> str | None:
    """Return the message for an error that the user can correct, or None for any other error."""
    if isinstance(error, UserError) or _is_instance(
        error, "lightning.fabric.utilities.exceptions", "MisconfigurationException"
    ):
        return str(error)
    if (package := missing_package(error)) in EXTRAS:
        return f"This command needs {package}: pip install 'cifarnet[{EXTRAS[package]}]'"
    if (disk_error := _disk_error(error)) is not None:
        problem = f"{disk_error.filename} cannot be written: {disk_error.strerror}. The previous version was kept."
        return f"{problem} Free disk space, or choose another disk, and try again."
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:60]}…: the name of this file or folder is too long. Choose a shorter path."
    if _is_out_of_memory(error):
        return f"Out of memory. Choose a smaller data.batch_size or model. ({str(error).partition(chr(10))[0]})"
    if isinstance(error, ImportError) and _raising_module(error).partition(".")[0] == "torch":
        return f"PyTorch cannot be imported: {error}. Raise the limit of memory (ulimit -v), or install PyTorch again."
    if isinstance(error, InstantiationException):  # raised by a class that the config names
        cause = error.__cause__
        if cause is None or isinstance(cause, HydraException | OmegaConfBaseException):
            return " ".join(str(error).split())
        section = str(error).rpartition("full_key: ")[2]
        return explain(cause) or f"{section}: {cause}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override or re.search(r"\s=|=\s", error.override):  # `optimizer.lr = 0.1`
            return f"{error.override} is not a setting. Write a setting as key=value, without spaces around the =."
        key, _, value = error.override.partition("=")
        found = re.sub(r"Error parsing override .*|Lexer.*| +\^|See https.*", "", str(error)).split()
        problem = " ".join([f"cannot be parsed{':' * bool(found)}", *found])
        text = shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
        return f"{error.override} {problem}. If the value is text, quote it: {text}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group == "hydra/launcher" and (package := name.partition("_")[0]) in EXTRAS:
            return f"This launcher needs {package}: pip install 'cifarnet[{EXTRAS[package]}]'"
        suggestion = did_you_mean(name, error.options)
        return f"{group}={name} does not exist.{suggestion} Choose one of these: {', '.join(error.options)}."
    if isinstance(error, ConfigCompositionException) and isinstance(
        error.__cause__, ConfigKeyError | ConfigAttributeError
    ):
        return _unknown_setting(error.__cause__)
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = f": {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        return " ".join(f"{error}{cause}".split())
    if isinstance(error, ValueError):
        module = _raising_module(error)
        if module.startswith("hydra."):  # such as scheduler=null
            return " ".join(str(error).split())
        if module == "logging.config":  # such as a run's folder whose name contains ${
            return f"hydra.job_logging: {error}: {error.__cause__} Check the name and the folder of the run."
        if module.startswith("lightning.pytorch."):  # a setting that Lightning checks when training starts
            return " ".join(f"trainer: {error}".split())
    return None


def _unknown_setting(error: Any) -> str:
    """Return the message for a key that the composed config does not have."""
    root = OmegaConf.to_container(error.parent_node._get_root(), resolve=False)
    assert isinstance(root, dict)
    if not str(error.full_key).startswith("hydra"):
        root.pop("hydra", None)
    suggestion = did_you_mean(error.full_key, _keys(root) | {path.name for path in CONFIGS.glob("*/")})
    return f"{error.full_key}: unknown setting.{suggestion} (To add a new setting, put a + before it.)"


def _keys(config: dict[Any, Any], prefix: str = "") -> set[str]:
    """Return the full keys of all settings in a nested config."""
    nested = (_keys(value, f"{prefix}{key}.") for key, value in config.items() if isinstance(value, dict))
    return {f"{prefix}{key}" for key in config}.union(*nested)


def is_machine_fault(error: BaseException) -> bool:
    """Return whether a full disk, too little memory or a killed process caused an error, and not a run's settings."""
    is_fault = any(isinstance(cause, MachineFault) or _is_out_of_memory(cause) for cause in causes(error))
    return is_fault or _disk_error(error) is not None


def missing_package(error: BaseException) -> str:
    """Return the name of the module whose absence caused an error, or an empty text."""
    names = (cause.name for cause in causes(error) if isinstance(cause, ModuleNotFoundError))
    return next(names, None) or ""


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or _is_instance(error, "torch", "OutOfMemoryError")


def _disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of a full or failing disk that caused this error, or None."""
    return next((cause for cause in causes(error) if isinstance(cause, OSError) and cause.errno in DISK_ERRORS), None)


def _is_instance(error: BaseException, module: str, name: str) -> bool:
    """Return whether an error is an instance of a class, without importing its module."""
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def _raising_module(error: BaseException) -> str:
    """Return the name of the module whose code raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__"))
