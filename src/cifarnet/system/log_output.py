"""Libraries say what a user can act on, and no more."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from lightning_utilities.core import rank_zero
from tensorboard.compat import tf

from cifarnet.errors import printable


def quiet_libraries() -> None:
    """Warnings stay; notes about hardware found and advice that does not apply here go."""
    import lightning.fabric  # noqa: F401  importing it sets its loggers to talk: not after this

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()  # under Hydra every line would appear twice
        logger.setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # that it makes what is not there yet
    profilers = logging.getLogger("lightning.pytorch.profilers")  # their reports are asked for
    profilers.handlers[:] = [logging.StreamHandler(sys.stdout)]
    profilers.setLevel(logging.INFO)
    for message in (
        ".*exists and is not empty.*",  # the run's folder is also the logger's
        ".*smaller than the logging interval.*",  # metrics are logged once an epoch
        ".*does not have many workers.*",
        ".*treespec.*",
        ".*`srun` command is available.*",  # one process needs none
        ".*sync_dist=True.*",  # metrics are of all ranks already
        ".*Total length of `list`.*",  # training without validation
        ".*Glyph .* missing from font.*",  # in the name of a picture or a class
        ".*decompression bomb DOS attack.*",  # the largest pictures that are read
    ):
        warnings.filterwarnings("ignore", message)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Lightning's Fabric does not say meanwhile which precision it was asked for."""
    before = rank_zero.log.level  # that of whichever part of Lightning was imported last
    rank_zero.log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        rank_zero.log.setLevel(before)


def without_tensorflow() -> None:
    """TensorBoard would import it where it is installed: seconds and chatter, for files that it can write without."""
    stub = "tensorboard.compat.notf"  # TensorBoard's own sign to do without
    sys.modules[stub] = ModuleType(stub)
    tf.io  # noqa: B018  it is decided on first use
    del sys.modules[stub]


def report(lines: str, on_terminal: bool = True) -> None:
    """Print lines about a run, and write them to its `train.log`."""
    logging.getLogger("cifarnet").info(lines)
    if on_terminal:
        print(printable(lines), flush=True)


def log_to_file(path: Path) -> None:
    """Write what `report` prints to a file as well, as Hydra's logging does (configs/train.yaml)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=path, level="INFO", format="[%(asctime)s] %(message)s")
