"""Several trained networks as one: the mean of their probabilities, or of their weights."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

from cifarnet.checkpoint import Checkpoint, checkpoint_path
from cifarnet.data import ImageDataModule
from cifarnet.errors import UserError
from cifarnet.finetuning import DIVISION
from cifarnet.inference.predictor import Batches, Predictions, Predictor
from cifarnet.inference.trained import Trained
from cifarnet.recipes.swa import update_mean


class Ensemble:
    """The mean of the probabilities of several networks (Lakshminarayanan et al., 2017,
    https://arxiv.org/abs/1612.01474).

    Each member has its own precision, memory format and test-time augmentation.

    Args:
        members: the networks, by the paths of their checkpoints.

    Attributes:
        tta, precision: those of the members, joined by " / " if they differ.
        tta_share: the largest of the members.
    """

    def __init__(self, members: Mapping[str, Predictor]) -> None:
        self.members = members
        self.tta = " / ".join(dict.fromkeys(member.tta for member in members.values()))
        self.precision = " / ".join(dict.fromkeys(str(member.precision) for member in members.values()))
        self.tta_share = max(member.tta_share for member in members.values())
        self.device = next(iter(members.values())).device

    def predict_all(self, batches: Batches, title: str) -> Predictions:
        """Return the predictions for all batches, as `Predictor.predict_all`, with the logits of the members."""
        parts = [member.predict_all(batches, title) for member in self.members.values()]
        one_view, logits = [part.one_view for part in parts], [part.logits for part in parts]
        return parts[0]._replace(one_view=combine(one_view), logits=combine(logits), members=logits)


def combine(logits: list[Tensor]) -> Tensor:
    """Return logits [B, num_classes] whose softmax is the mean of the softmax over several networks: the logarithms of
    the mean probabilities."""
    return torch.stack(logits).log_softmax(2).logsumexp(0) - math.log(len(logits))


def make_soup(members: Sequence[Predictor], data: ImageDataModule) -> Predictor:
    """Return the first predictor with another network, whose weights are the means over all members: a uniform soup
    (Wortsman et al., 2022, https://arxiv.org/abs/2203.05482).

    The statistics of batch norms are recomputed: they are means over batches of training images without augmentation.
    """
    average: Any = AveragedModel(members[0].network, multi_avg_fn=update_mean, use_buffers=True)
    for member in members:
        average.update_parameters(member.network)
    soup, train = copy.copy(members[0]), data.source.train
    soup.network = average.module.eval()
    size = math.ceil(len(train) / math.ceil(len(train) / 1000))  # equal sizes: all batches have the same weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # update_bn turns dropout on
        batches = tqdm(data.loader(train, size), "batch norm", leave=False, disable=None)
        update_bn(batches, soup.network, soup.device)
    return soup


def make_predictor(runs: Sequence[Trained], config: DictConfig) -> Predictor | Ensemble:
    """Return the predictor of one run, or the ensemble of several runs.

    Args:
        config: the settings in `configs/evaluate.yaml` or `predict.yaml`.

    Raises:
        UserError: a setting cannot be used.
    """
    settings, members = {name: config[name] for name in ("tta", "precision", "accelerator")}, {}
    for run in runs:
        share = run.checkpoint.tta_share if config.get("tta_share") is None else config.tta_share
        members[str(run.checkpoint.path)] = run.predictor(tta_share=share, **settings)
    return Ensemble(members) if len(members) > 1 else next(iter(members.values()))


def expand(path: str | Path) -> list[Path]:
    """Return the checkpoints of the finished runs in the folder of a sweep, except for those that were removed. For
    any other path, return its checkpoint."""
    folders = (record.parent for record in Path(path).expanduser().glob("*/metrics.json"))
    found = map(checkpoint_path, sorted(folders, key=lambda run: (len(run.name), run)))  # 2 comes before 10
    return [checkpoint for checkpoint in found if checkpoint.exists()] or [checkpoint_path(path)]


def check(checkpoints: Sequence[Checkpoint], settings: DictConfig) -> Sequence[str]:
    """Check that checkpoints can be evaluated together. Their classes and image sizes are checked with the data.

    Args:
        settings: the settings in `configs/evaluate.yaml`, without `data`.

    Returns:
        Overrides of `data`: if the runs were validated on different images, a run may have been trained on those of
        another run, so no images are used for validation.

    Raises:
        UserError: a setting needs a single run, the runs were trained on different data sets, or `soup` is set and
            there is a single run or their networks differ.
    """
    for name in ("attack", "features", "ood"):
        if settings[name] and len(checkpoints) > 1:
            problem = f"{name}={settings[name]} needs a single run, but got {len(checkpoints)}"
            raise UserError(f"{problem}. Remove {name}, or evaluate one of the runs.")
    sources = {str(one.data["_target_"]) for one in checkpoints if "_target_" in one.data}  # exports have none
    if len(sources) > 1:
        raise UserError(f"The runs were trained on {' and '.join(sorted(sources))}. Evaluate runs on one data set.")
    if settings.soup and (len(checkpoints) == 1 or any(one.model != checkpoints[0].model for one in checkpoints)):
        raise UserError("soup=true needs several runs of the same network with the same settings. Remove soup=true.")
    differing = [name for name in DIVISION if len({one.data.get(name) for one in checkpoints}) > 1]
    if differing:
        print(f"Without validation images, because data.{differing[0]} differs between the runs", flush=True)
    return ["++data.val_fraction=0", "++data.folds=null", "++data.fold=null"] if differing else []
