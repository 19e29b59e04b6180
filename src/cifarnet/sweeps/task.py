"""The function that Hydra calls with each composed config: for a single run, or for each job of a sweep."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from cifarnet.config import CONFIGS
from cifarnet.errors import UserError
from cifarnet.sweeps import jobs
from cifarnet.system import files

if TYPE_CHECKING:  # torch takes seconds to import
    from cifarnet.data.shared_images import SharedImages


class Task:
    """Trains a single run or a job of a sweep.

    Args:
        train: `train.train`.
    """

    def __init__(self, train: Callable[..., Any]) -> None:
        self.train = train
        self.images: SharedImages | None = None  # images of the previous job
        self.called = False
        self.error: Exception | None = None  # error of a single run; Hydra would also print the overrides

    def __call__(self, config: DictConfig, trial: Any = None) -> Any:
        self.called = True
        if config.ckpt_path is not None:
            raise UserError("ckpt_path cannot be set in a config file. Set it on the command line, for a single run.")
        if jobs.is_job():
            from cifarnet.data.shared_images import SharedImages

            self.images = self.images or SharedImages()
            return jobs.run_job(config, self.train, trial, self.images)
        try:
            jobs.refuse_launcher()
            return self.train(config)
        except Exception as error:
            files.remove_if_unused(Path(config.output_dir))
            self.error = error


def run_hydra(train: Callable[..., Any], arguments: Sequence[str], name: str = "train") -> None:
    """Compose a config from arguments and train, as `@hydra.main` does with the arguments of the process.

    Args:
        train: the function that is called with the config.
        arguments: the arguments of the command.
        name: the name of the config, such as "train" for `configs/train.yaml`.

    Raises:
        UserError: an argument is unknown, or the run's folder cannot be created.
    """
    from hydra._internal.utils import _run_hydra, get_args_parser  # private, because hydra.main reads sys.argv

    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")  # sets the version
    parser, task = get_args_parser(), Task(train)
    parser.allow_abbrev = False  # --experiment must not mean --experimental-rerun
    parsed, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        raise UserError(f"Unknown option {unknown[0]}. Write settings without dashes: optimizer.lr=0.1")
    if parsed.experimental_rerun is not None:
        raise UserError("--experimental-rerun is not supported. Use ckpt_path=<run> to resume a run.")
    if parsed.package is not None and not parsed.cfg:
        raise UserError(f"--package {parsed.package} requires --cfg. Add --cfg job, or remove it.")
    try:
        _run_hydra(parsed, parser, task, str(CONFIGS), name)
    except OSError as error:
        if task.called or isinstance(error, HydraException):  # some of Hydra's errors are OSErrors
            raise
        remedy = "Choose another folder: hydra.run.dir=…, or hydra.sweep.dir=… for a sweep."
        raise UserError(f"{error.filename} cannot be created: {error.strerror}. {remedy}") from error
    if task.error is not None:
        raise task.error
