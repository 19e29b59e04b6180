"""Several trained networks as one: the mean of their probabilities, or of their weights."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import combinations
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

from cifarnet.checkpoint import Checkpoint, checkpoint_path, is_run
from cifarnet.data.datamodule import Split
from cifarnet.errors import UserError, printable
from cifarnet.finetuning import DIVISION
from cifarnet.inference.predictor import Batches, Predictions, Predictor
from cifarnet.inference.trained import Trained
from cifarnet.recipes.swa import update_mean
from cifarnet.records.evaluation import Evaluation
from cifarnet.system import files

WITHOUT_VALIDATION = ("++data.val_fraction=0", "++data.folds=null", "++data.fold=null")


class Ensemble:
    """The mean of the probabilities of several networks (Lakshminarayanan et al., 2017,
    https://arxiv.org/abs/1612.01474), with the interface of `Predictor`.

    Each member has its own precision, memory format and test-time augmentation.

    Args:
        members: the networks, by the paths of their checkpoints.
        soup: the network with the mean of the members' weights, which is not a member.

    Attributes:
        tta, precision: those of the members, joined by " / " if they differ.
        tta_share: the largest of the members.
    """

    def __init__(self, members: Mapping[str, Predictor], soup: Predictor | None = None) -> None:
        self.members, self.soup = members, soup
        self.tta = " / ".join(dict.fromkeys(member.tta for member in members.values()))
        self.precision = " / ".join(dict.fromkeys(str(member.precision) for member in members.values()))
        self.tta_share = max(member.tta_share for member in members.values())
        self.device = next(iter(members.values())).device

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of images [B, C, H, W], without and with test-time augmentation, each [B, num_classes]."""
        one_view, logits = zip(*(member(images) for member in self.members.values()), strict=True)
        return combine(one_view), combine(logits)

    def predict_all(self, batches: Batches, title: str) -> Predictions:
        """Return the predictions for all batches, as `Predictor.predict_all`, with the logits of the members."""
        parts = [member.predict_all(batches, title) for member in self.members.values()]
        one_view, logits = [part.one_view for part in parts], [part.logits for part in parts]
        means = {"one_view": combine(one_view), "logits": combine(logits)}
        return parts[0]._replace(**means, members=logits)


def combine(logits: Sequence[Tensor]) -> Tensor:
    """Return logits [B, num_classes] whose softmax is the mean of the softmax over several networks.

    This determines them except for a constant in each row. With this constant, their logsumexp is the mean over the
    networks, so that the energy (Liu et al., 2020, https://arxiv.org/abs/2010.03759) is the mean energy.
    """
    stacked = torch.stack(list(logits))
    totals = stacked.logsumexp(2, keepdim=True)
    return (stacked - totals).logsumexp(0) - math.log(len(stacked)) + totals.mean(0)


def average_weights(runs: Sequence[Trained]) -> nn.Module:
    """Return a network with the mean of the weights of all runs, a uniform soup (Wortsman et al., 2022,
    https://arxiv.org/abs/2203.05482).

    Raises:
        UserError: the names or shapes of the weights differ.
    """
    soup = AveragedModel(runs[0].network, multi_avg_fn=update_mean, use_buffers=True)
    for run in runs:
        first = f"the network of {runs[0].checkpoint.path}, which soup=true requires"
        run.checkpoint.check_weights(soup.module, run.network.state_dict(), first)
        soup.update_parameters(run.network)
    return soup.module


def recompute_statistics(predictor: Predictor, train: Split, batch_size: int = 1000) -> None:
    """Recompute the statistics of batch norms, which are means over batches of training images without augmentation."""
    # the sizes of the batches differ by at most one image, because each batch has the same weight
    index = torch.arange(len(train)).tensor_split(-(-len(train) // batch_size))
    batches = (next(train[part].chunks(batch_size)) for part in tqdm(index, "batch norm", leave=False, disable=None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # update_bn turns dropout on
        update_bn(batches, predictor.network, predictor.device)
    predictor.network.eval()


def make_predictor(runs: Sequence[Trained], config: DictConfig) -> Predictor | Ensemble:
    """Return the predictor of one run, or the ensemble of several runs.

    Args:
        config: the settings in `configs/evaluate.yaml`. With `soup`, the ensemble has a soup, with the precision and
            the test-time augmentation of the first run; call `recompute_statistics` before using it.

    Raises:
        UserError: a setting cannot be used, or the weights of a soup have different names or shapes.
    """

    def make(run: Trained, network: nn.Module | None = None) -> Predictor:
        share = run.checkpoint.tta_share if config.tta_share is None else config.tta_share
        settings = {"tta": config.tta, "precision": config.precision, "accelerator": config.accelerator}
        return run.predictor(network, tta_share=share, **settings)

    if len(runs) == 1:
        return make(runs[0])
    soup = make(runs[0], average_weights(runs)) if config.soup else None
    return Ensemble({str(run.checkpoint.path): make(run) for run in runs}, soup)


def expand(path: str | Path) -> Sequence[str | Path]:
    """Return the finished runs in the folder of a sweep, except for those whose checkpoints were removed. Any other
    path is returned as it is."""
    if checkpoint_path(path).exists():
        return [path]
    records = Path(path).expanduser().rglob("metrics.json")
    folders = [file.parent for file in records if not file.with_name("report.html").exists()]  # not of an evaluation
    runs = [folder for folder in folders if checkpoint_path(folder).exists()]
    runs.sort(key=lambda run: (len(run.name), run))  # 2 comes before 10
    if runs and len(runs) < len(folders):
        count = f"{len(folders) - len(runs)} of {len(folders)} finished runs in {path}"
        print(printable(f"Left out: {count}, whose checkpoints were removed (sweep.keep_checkpoints)"), flush=True)
    return runs or [path]


def check(checkpoints: Sequence[Checkpoint], settings: DictConfig) -> str | None:
    """Check that checkpoints can be evaluated together.

    Args:
        settings: the settings in `configs/evaluate.yaml`, without `data`.

    Returns:
        None, or the reason why no images can be used for validation.

    Raises:
        UserError: a setting needs one run or several runs, or the runs were trained on different images or classes.
    """
    count, reason = len(checkpoints), None
    for name in ("soup",) if count == 1 else ("attack", "features"):
        if settings[name]:
            needed = "several runs" if count == 1 else "one run"
            raise UserError(f"{name}={str(settings[name]).lower()} needs {needed}, but got {count}. Remove {name}.")
    for first, second in combinations(checkpoints, 2):
        divided = [name for name in DIVISION if first.data.get(name) != second.data.get(name)]
        names = ["class_names", "image_size"] if divided else ["class_names", "image_size", "num_images"]
        facts = {name: (getattr(first, name), getattr(second, name)) for name in names}
        facts["data"] = first.data.get("_target_"), second.data.get("_target_")
        for name, (one, other) in facts.items():
            is_same = first.has_classes(other) if name == "class_names" else one == other
            if None not in (one, other) and not is_same:  # None: unknown
                differ = f"{first.path} and {second.path} were trained on different images: {name} is {one} and {other}"
                raise UserError(f"{differ}. Evaluate only runs on the same images together.")
        if divided:
            differ = f"{first.path} and {second.path} were validated on different images (data.{divided[0]} differs)"
            reason = f"{differ}, so that one may have been trained on those of the other"
    return reason


def output_folder(output_dir: str | None, paths: Sequence[str | Path], checkpoints: Sequence[Checkpoint]) -> Path:
    """Create the folder of an evaluation: `output_dir`; the folder `evaluation` of a run or a sweep; or, for several
    paths, a new folder in lightning_logs/ensemble.

    Raises:
        UserError: the folder contains the record of a run or, for several runs, the evaluation of one run.
    """
    is_single, date = len(checkpoints) == 1, f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    if output_dir is not None:
        folder = Path(output_dir)
    elif is_single:
        folder = checkpoints[0].folder_for("evaluation")
    else:
        sweep = Path(paths[0]).expanduser()
        folder = sweep / "evaluation" if len(paths) == 1 else Path("lightning_logs", "ensemble", date)
        files.refuse_links(sweep, [folder])
    record, problem = folder / "metrics.json", ""
    if is_run(folder):
        problem = "is the folder of a run, whose record would be lost"
    elif not is_single and record.exists() and Evaluation.read(record).members is None:
        problem = "contains the evaluation of one run, which would be lost"
    if problem:
        raise UserError(f"output_dir={folder} {problem}. Choose another folder.")
    files.make_folder(folder, f"output_dir={folder} cannot be created")
    return folder
