"""A run as all its ranks build it: rank 0 from its arguments, the others from what it tells them."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from cifarnet.build import Built, build
from cifarnet.callbacks.pruning import Prune
from cifarnet.errors import UserError
from cifarnet.resuming import Resume
from cifarnet.sweeps import jobs, shared_images
from cifarnet.system.distributed import Job


def build_run(config: DictConfig, ckpt_path: str | Path | None, callbacks: Sequence[Callback]) -> Built:
    """What trains, from the beginning or from that checkpoint."""
    resuming = [] if ckpt_path is None else [Resume(ckpt_path)]
    read = functools.partial(shared_images.read_before().give, config.data) if jobs.is_job() else None
    return build(config, [*callbacks, *resuming], fresh=ckpt_path is None, read=read)


def job(config: DictConfig, ckpt_path: str | Path | None, callbacks: Sequence[Callback], size: int) -> Job:
    """What the other ranks of `size` are told.

    Raises:
        UserError: a callback cannot be told.
    """
    if size > 1 and (own := [callback for callback in callbacks if not isinstance(callback, Prune)]):
        name = type(own[0]).__name__
        raise UserError(f"{name}, given to train(), would act on one of {size} ranks. Give +callbacks.<name>={{…}}.")
    plain = _plain(config, OmegaConf.to_container(config, resolve=False)) | {"logger": None}
    return {"config": plain, "ckpt_path": ckpt_path and str(ckpt_path), "searched": bool(callbacks)}


def _plain(node: Any, raw: Any) -> Any:
    """What a config says, raw but for what only rank 0 can tell: `${hydra:…}`, or the time."""
    if isinstance(raw, dict | list):
        members = raw.items() if isinstance(raw, dict) else enumerate(raw)
        told = {key: _told(node, key, value) for key, value in members}
        return told if isinstance(raw, dict) else list(told.values())
    return raw


def _told(parent: Any, key: Any, raw: Any) -> Any:
    if isinstance(raw, str) and re.search(r"\$\{\w[\w.]*:", raw) and "total_steps" not in raw:
        return OmegaConf.to_container(OmegaConf.create({"told": parent[key]}), resolve=True)["told"]
    return _plain(parent[key], raw) if isinstance(raw, dict | list) else raw


def build_told(job: Job) -> Built:
    """The same in another rank."""
    return build_run(OmegaConf.create(job["config"]), job["ckpt_path"], [Prune()] if job["searched"] else [])
