"""Log output: suppress library messages that a user cannot act on, and write the lines of a run to its log."""

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
    """Suppress notes about the hardware and advice that does not apply. Other warnings are shown."""
    # lightning.fabric sets the level of its loggers when it is first imported
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()  # otherwise every line would appear twice under Hydra
        logger.setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # it announces what it creates
    profilers = logging.getLogger("lightning.pytorch.profilers")  # the user enabled them
    profilers.handlers[:] = [logging.StreamHandler(sys.stdout)]
    profilers.setLevel(logging.INFO)
    for message in (
        ".*exists and is not empty.*",  # the run's folder is also the logger's
        ".*treespec.*",
        ".*Total length of `list`.*",  # training without validation
        ".*decompression bomb DOS attack.*",  # raised only for larger images
    ):
        warnings.filterwarnings("ignore", message)
    # advice about workers, logging intervals, resumable loaders, reduction over ranks and srun, which does not apply
    warnings.filterwarnings("ignore", category=PossibleUserWarning)


@contextlib.contextmanager
def quiet_fabric() -> Iterator[None]:
    """Suppress the message of Lightning's Fabric about the precision that was chosen."""
    before = rank_zero.log.level  # the level depends on the part of Lightning that was imported last
    rank_zero.log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        rank_zero.log.setLevel(before)


def disable_tensorflow() -> None:
    """Prevent TensorBoard from importing TensorFlow, which takes seconds."""
    stub = "tensorboard.compat.notf"  # TensorBoard looks for this module
    sys.modules[stub] = ModuleType(stub)
    tf.io  # noqa: B018  TensorBoard decides on first use
    del sys.modules[stub]


def report(lines: str, on_terminal: bool = True) -> None:
    """Print lines about a run, and write them to its `train.log`."""
    lines = printable(lines)  # names in files may contain sequences that control a terminal, which may show the log
    logging.getLogger("cifarnet").info(lines)
    if on_terminal:
        print(lines, flush=True)


def log_to_file(path: Path) -> None:
    """Also write the output of `report` to a file, as Hydra's logging does (configs/train.yaml)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=path, encoding="utf-8", format="[%(asctime)s] %(message)s")
    logging.getLogger("cifarnet").setLevel(logging.INFO)
