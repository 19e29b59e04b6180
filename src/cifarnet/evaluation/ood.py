"""Out-of-distribution detection: how well a network's scores separate test images from images of other classes.

A higher score means that an image is more like the test images; the signs of energy and distance are reversed. All
scores are computed without test-time augmentation.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchvision import datasets

from cifarnet.data import ImageDataModule, InMemoryLoader, Torchvision
from cifarnet.data.decoding import expand_folders
from cifarnet.data.folder import ImageFiles
from cifarnet.errors import UserError
from cifarnet.evaluation import figures, metrics
from cifarnet.evaluation.subject import Section, Subject
from cifarnet.inference.predictor import Predictions, Predictor
from cifarnet.schema import did_you_mean
from cifarnet.seeding import generator


def read(names: str | Sequence[str] | None, data: ImageDataModule, seed: int) -> dict[str, InMemoryLoader]:
    """Read the sets of out-of-distribution images, at the image size of `data`. Their labels have no meaning.

    Args:
        names: the setting `ood`.
        data: the data of the network; "noise" has as many images as its test set.
        seed: the seed of "noise".

    Raises:
        UserError: a set does not exist or cannot be read.
    """
    loaders = {}
    for name in [names] if isinstance(names, str) else names or ():
        images = _images(name, data, seed)
        loaders[name] = InMemoryLoader(images, torch.zeros(len(images), dtype=torch.int64), data.eval_batch_size)
    return loaders


def _images(name: str, data: ImageDataModule, seed: int) -> Any:
    """Return noise, the test images of a data set, or the images in and below a folder: uint8 [N, 3, size, size]."""
    size, known = data.image_size, {dataset.lower(): dataset for dataset in datasets.__all__}
    if name == "noise":
        shape = len(data.source.test), 3, size, size
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator(seed, 0, "ood"))
    if dataset := known.get(name.lower()):
        return Torchvision(dataset, f"data/{dataset}", image_size=size).read_test().images  # root: as in its config
    folder = Path(name).expanduser()
    paths: Any = [*expand_folders(folder)] if folder.is_dir() else []
    if not paths:
        problem = f"ood={name}: no such folder contains images.{did_you_mean(name, ['noise', *known])}"
        raise UserError(f"{problem} Choose noise, a data set of torchvision such as svhn, or a folder of images.")
    return ImageFiles(paths, size).read(progress_bar=True)


def section(subject: Subject) -> Section:
    """Return the `separation` of each set from the test images by each score, and the histograms of the scores."""
    if not subject.public.ood:
        return None, {}
    (train, test), predictor = subject.features, subject.predictor
    assert isinstance(predictor, Predictor)  # `ensemble.check` refuses `ood` for an ensemble
    distance = mahalanobis(train.features, train.labels)
    inside = scores(test, distance)
    outside = {name: scores(predictor.embed(batches, name), distance) for name, batches in subject.public.ood.items()}
    record = {name: {key: separation(inside[key], found[key]) for key in inside} for name, found in outside.items()}
    return record, {"ood": figures.score_histograms({"test images": inside} | outside)}


def scores(images: Predictions, distance: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the scores of images, each float64 [N], by name.

    - maximum probability (Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136)
    - energy (Liu et al., 2020, https://arxiv.org/abs/2010.03759)
    - maximum logit (Hendrycks et al., 2022, https://arxiv.org/abs/1911.11132)
    - Mahalanobis distance (Lee et al., 2018, https://arxiv.org/abs/1807.03888), of the features of the last layer

    Args:
        distance: the result of `mahalanobis`.
    """
    logits = images.one_view.double()
    found = {"maximum probability": logits.softmax(1).amax(1), "energy": logits.logsumexp(1)}
    return found | {"maximum logit": logits.amax(1), "Mahalanobis distance": -distance(images.features)}


def mahalanobis(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function of features [M, D] that returns their Mahalanobis distances to the nearest class mean, [M].

    All classes share one covariance, that of the features around their class means (Lee et al., 2018,
    https://arxiv.org/abs/1807.03888). Directions without variance are left out, as by a pseudo-inverse.

    Args:
        features, labels: those of the training images, [N, D] and int64 [N].
    """
    features, labels = features.double(), labels.unique(return_inverse=True)[1]
    means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
    variances, directions = torch.linalg.eigh((features - means[labels]).T.cov(correction=0))
    kept = variances > variances[-1] * len(variances) * torch.finfo(torch.float64).eps
    whiten = directions[:, kept] / variances[kept].sqrt()
    return lambda images: torch.cdist(images.double() @ whiten, means @ whiten).amin(1)


def separation(inside: Tensor, outside: Tensor) -> dict[str, Any]:
    """Return how well a score separates test images from out-of-distribution images, whose scores should be lower.

    Args:
        inside, outside: the scores of the images, [N] and [M].

    Returns:
        - images: M
        - auroc: the area under the ROC curve, with its 95% interval (Hanley and McNeil, 1982,
          doi:10.1148/radiology.143.1.7063747)
        - aupr_in, aupr_out: the average precision with the test images, or with the others, as the positive class
        - fpr95: the fraction of the out-of-distribution images that are accepted if 95% of the test images are, as
          `metrics.proportion`
    """
    n, m = len(inside), len(outside)
    is_inside = (torch.arange(n + m) < n).long()
    ranks = torch.from_numpy(rankdata(torch.cat([inside, outside]))) / (n + m)  # torchmetrics takes numbers from 0 to 1
    auroc = min(1.0, binary_auroc(ranks, is_inside).item())  # its sum in float32 can exceed 1
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + (n - 1) * (q1 - auroc**2) + (m - 1) * (q2 - auroc**2)
    width = 1.96 * math.sqrt(max(0.0, variance) / (n * m))
    aupr_in, aupr_out = binary_average_precision(ranks, is_inside), binary_average_precision(1 - ranks, 1 - is_inside)
    threshold = inside.sort(descending=True).values[math.ceil(95 * n / 100) - 1]
    fpr95 = metrics.proportion(int((outside >= threshold).sum()), m)
    record = {"images": m, "auroc": auroc, "auroc_interval": [max(0.0, auroc - width), min(1.0, auroc + width)]}
    return record | {"aupr_in": aupr_in.item(), "aupr_out": aupr_out.item(), "fpr95": fpr95}
