"""What a multirun's record may bring along when it is gone on with: it may be a stranger's."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, QuotedString
from hydra.errors import HydraException

from cifarnet import cli
from cifarnet.config import CONFIGS
from cifarnet.errors import UserError

PARAMS = "hydra.sweeper.params."  # before the key of an override that the sweeper makes of it
PLAIN = (
    r"hydra/(launcher|sweeper|job_logging|hydra_logging)|hydra\.verbose"
    r"|hydra\.sweeper\.(max_batch_size|trials|study_name|heartbeat|pruner|(pruner|sampler)\..+)"
)
LAUNCHER, WORD = r"hydra\.launcher\.[a-z]\w*", r"[\w.:,@%+-]*"  # such as a partition; neither a place nor a command
PLACES = {"output_dir", "ckpt_path", "classes", "sweep"}
NO_PLACES = {"sweep.keep_checkpoints", "sweep.stop_at_failure"}


def checked(lines: Sequence[str], record: Path, classes: Sequence[Any] = ()) -> list[str]:
    """The saved overrides, if they choose among this project's configs and set what a checkpoint may.

    Raises:
        UserError: one does more, such as naming another class, a place, or a setting of Hydra's.
    """
    parser = OverridesParser.create()
    for line in lines:
        try:
            override = parser.parse_override(str(line))
        except HydraException as error:
            raise _refused(line, record) from error
        key = override.key_or_group
        if key.startswith(PARAMS) and not (override.is_delete() or override.is_sweep_override()):
            checked([f"{key.removeprefix(PARAMS)}={_plain(override.value())}"], record, classes)
            continue
        launcher = re.fullmatch(LAUNCHER, key) and re.fullmatch(WORD, str(_plain(override.value())))
        hydras = f"{key}.".startswith(("hydra.", "hydra/")) and not (re.fullmatch(PLAIN, key) or launcher)
        place = key.partition(".")[0] in PLACES and key not in NO_PLACES
        place |= addresses(str(line))
        if hydras or str(line).startswith("-") or override.package is not None or place:
            raise _refused(line, record)
        for value in _values(override):
            _check(key, value, line, record, classes)
    return [str(line) for line in lines]


def addresses(line: str) -> bool:
    """May it name an address to fetch from or to log to? Such come from the user's own command alone."""
    key = cli.key_of(line)
    return key == "data.url" or (key.startswith("logger.") and not line.startswith("~"))


def _values(override: Override) -> list[Any]:
    """What an override sets, or each of what a sweep does."""
    if override.is_delete() or isinstance(override.value(), IntervalSweep | Glob):  # numbers; this project's files
        return []
    if not override.is_sweep_override():
        return [override.value()]
    return [OverridesParser.create().parse_override(f"a={text}").value() for text in override.sweep_string_iterator()]


def _check(key: str, value: Any, line: str, record: Path, classes: Sequence[Any]) -> None:
    if (CONFIGS / key).is_dir() or "/" in key:  # a choice of files, which are to be this project's
        names = value if isinstance(value, list) else [value]
        if not all(re.fullmatch(r"\w[\w-]*", str(name)) for name in names):
            raise _refused(line, record)
        return
    from cifarnet import checkpoint  # which imports torch

    *sections, name = key.split(".")
    node: Any = {name: value}
    for section in reversed(sections):
        node = {section: node}
    checkpoint.checked(_plain(node), record, classes)


def _plain(node: Any) -> Any:
    """Hydra's own types as Python's."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    return node.text if isinstance(node, QuotedString) else node


def _refused(line: str, record: Path) -> UserError:
    return UserError(f"{record} asks for {line}, which no record may. Give it in a command of your own.")
