"""A run as all its ranks build it: rank 0 from its arguments, the others from what it tells them."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from cifarnet.build import Built, build
from cifarnet.errors import UserError
from cifarnet.ranks import Job
from cifarnet.runs.resume import Resume
from cifarnet.runs.stopping import Prune


def build_run(config: DictConfig, ckpt_path: str | Path | None, callbacks: Sequence[Callback]) -> Built:
    """What trains, from the beginning or from that checkpoint."""
    return build(config, [*callbacks, *([] if ckpt_path is None else [Resume(ckpt_path)])])


def job(config: DictConfig, ckpt_path: str | Path | None, callbacks: Sequence[Callback], size: int) -> Job:
    """What the other ranks of `size` are told.

    Raises:
        UserError: a callback cannot be told.
    """
    if size > 1 and (own := [callback for callback in callbacks if not isinstance(callback, Prune)]):
        name = type(own[0]).__name__
        raise UserError(f"{name}, given to train(), would act on one of {size} ranks. Give +callbacks.<name>={{…}}.")
    plain = OmegaConf.to_container(config, resolve=False) | {"output_dir": config.output_dir, "logger": None}
    return {"config": plain, "ckpt_path": ckpt_path and str(ckpt_path), "searched": bool(callbacks)}


def build_told(job: Job) -> Built:
    """The same in another rank."""
    return build_run(OmegaConf.create(job["config"]), job["ckpt_path"], [Prune()] if job["searched"] else [])
