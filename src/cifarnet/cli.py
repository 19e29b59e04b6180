"""What every command shares: where configs lie, how a run is continued, how errors are told."""

import os
import pydoc
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cifarnet.errors import Interrupted, UserError

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parents[1]
CONFIGS = PACKAGE / "configs"  # in a wheel
if not CONFIGS.is_dir():
    CONFIGS = CHECKOUT / "configs"  # in a checkout, installed as editable or by PYTHONPATH=src


def run_folder(ckpt_path: str | None, default: str) -> str:
    """The folder of the run that a checkpoint belongs to, else `default`. Configs know it as `run_dir`."""
    if ckpt_path is None:
        return default
    folder = Path(ckpt_path).parent.parent
    return str(folder) if (folder / ".hydra").is_dir() else default


OmegaConf.register_new_resolver("run_dir", run_folder, replace=True)


def own_overrides() -> list[str]:
    """The overrides of this run's command, with its `--config-dir`: what a checkpoint needs to go on alone."""
    if not HydraConfig.initialized():
        return []
    this = HydraConfig.get()
    folders = [source.path for source in this.runtime.config_sources if source.provider == "command-line"]
    return [*(f"--config-dir={folder}" for folder in folders), *this.overrides.task]


def with_saved_overrides(arguments: Sequence[str]) -> list[str]:
    """With `ckpt_path=…`, put the overrides that its run had before it, but for those that are given anew."""
    given = {key_of(argument): place for place, argument in enumerate(arguments)}
    if "ckpt_path" not in given:
        return list(arguments)
    from cifarnet.checkpoint import read

    place = given["ckpt_path"]
    checkpoint = read(arguments[place].partition("=")[2].strip("'\""))
    saved = [
        override for override in checkpoint["hyper_parameters"].get("overrides", []) if key_of(override) not in given
    ]
    # flags first: Hydra wants all overrides in one piece
    saved.sort(key=lambda override: not override.startswith("--"))
    return [*arguments[:place], *saved, *arguments[place:]]


def key_of(override: str) -> str:
    """What an override is about: `data.root` of `+data.root=pictures`."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def check_types(config: DictConfig) -> None:
    """Compare the settings with the types that the classes and functions to be called declare.

    Raises:
        UserError: a setting of another type; a required setting that is missing.
    """
    for section in config:
        if isinstance(node := config[section], DictConfig):
            _check_node(str(section), node)


def _check_node(name: str, node: DictConfig) -> None:
    hints = _hints(node["_target_"]) if "_target_" in node else {}
    for key in node:
        try:
            value = node[key]
        except MissingMandatoryValue as error:
            raise UserError(f"{name}.{key} is needed: add {name}.{key}=…") from error
        if isinstance(value, DictConfig):
            _check_node(f"{name}.{key}", value)
        elif key in hints:
            check_type(f"{name}.{key}", value, hints[key])


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a setting whose value is not what a type hint says."""
    if not _fits(value, hint):
        raise UserError(f"{name}={value} has the wrong type: expected {_describe(hint)}.")


def _hints(target: str) -> dict[str, Any]:
    """The declared types of a class's or function's arguments, those of base classes included."""
    try:
        called = pydoc.locate(target)
    except pydoc.ErrorDuringImport:
        return {}  # building it will say what is wrong
    functions: list[Any] = [called]
    if isinstance(called, type):
        functions = [base.__init__ for base in reversed(called.__mro__)]
    hints: dict[str, Any] = {}
    for function in functions:
        try:
            hints.update(typing.get_type_hints(function))
        except Exception:  # a name that exists for type checkers only: nothing to compare with
            continue
    return hints


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    kind = origin or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    for container, plain in ((ListConfig, list), (DictConfig, dict)):
        if isinstance(value, container):
            return isinstance(kind, type) and issubclass(plain, kind)
    return not isinstance(kind, type) or not isinstance(value, str | int | float | None)


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        simple = [member for member in arguments if member in names or typing.get_origin(member) is not None]
        words = [word for member in simple for word in _describe(member).split(" or ")]
        return " or ".join(dict.fromkeys(words))
    if origin is typing.Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin is not None and arguments and arguments[0] in names:
        return f"a list like […, …] of {names[arguments[0]].removeprefix('a ')}s"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def run(task: Callable[[], Any]) -> None:
    """Run a command and end the process: mistakes of the user's in one message, bugs with their traceback.

    Exit status: 0, 1 for an error, 130 and 143 for a run stopped by Ctrl-C and SIGTERM. HYDRA_FULL_ERROR=1 shows
    the traceback of every error.
    """
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra is to raise what it would print
    try:
        task()
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted.status)
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise  # not Lightning's way of passing on a Ctrl-C
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if show_traceback or message is None:
            raise
        print(f"Error: {message}", file=sys.stderr)
        sys.exit(1)


def explain(error: BaseException) -> str | None:
    """What to tell the user, or None where the error is not known to be theirs."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, InstantiationException):  # raised by a class that a config names
        cause = error.__cause__
        if cause is None or isinstance(cause, HydraException | OmegaConfBaseException):
            return str(error)
        section = str(error).rpartition("full_key: ")[2]
        return explain(cause) or f"{section}: {cause}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: {error}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return f"{error}\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else str(error)
    if _raised_by_hydra(error):
        if not isinstance(error, OSError):
            return str(error)
        return (
            f"The run's folder cannot be made: {error.strerror}: {error.filename}. "
            "Choose another, such as hydra.run.dir=runs/mine (in a sweep: hydra.sweep.dir)."
        )
    return None


def _raised_by_hydra(error: BaseException) -> bool:
    """Before any code of a job ran: Hydra makes the run's folder itself."""
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    entered = [Path(hydra.__file__).parent in file.parents for file in files]
    if True not in entered:
        return False
    since = files[entered.index(True) :]
    return not any(PACKAGE in file.parents and file.name != "cli.py" for file in since)
