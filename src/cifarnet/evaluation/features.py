"""Features, the inputs of a network's last layer: their quality, and a map of the test images.

scikit-learn is imported only where it is used, because it is optional.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from cifarnet.evaluation import figures, metrics
from cifarnet.evaluation.subject import Section, Subject
from cifarnet.inference.predictor import Predictor
from cifarnet.recipes.backbone import head_name
from cifarnet.seeding import generator
from cifarnet.system import files

NEIGHBORS = 20
MOST_IN_MAP = 2000  # the largest number of images in the map


def check(predictor: Any, config: DictConfig) -> None:
    """Check that the features that `features=true` or `ood=` requires can be computed, before anything takes long.

    Args:
        predictor: that of the evaluation; an ensemble has no features.
        config: the settings in `configs/evaluate.yaml`.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        UserError: the network has no head.
    """
    if config.features:
        importlib.import_module("sklearn")
    if (config.features or config.ood) and isinstance(predictor, Predictor):
        head_name(predictor.network)


def section(subject: Subject) -> Section:
    """Write `features.npz`; return the accuracy of a linear probe and of nearest neighbors, and the map."""
    if not subject.config.features:
        return None, {}
    train, test = subject.train_features, subject.test_features
    arrays = {name: getattr(test, name).numpy() for name in ("features", "logits", "labels", "index")}
    with files.atomic_file(Path(subject.config.output_dir) / "features.npz") as file:
        np.savez(file, class_names=np.array(subject.data.class_names), **arrays)
    record: dict[str, Any] = {"dimensions": test.features.shape[1], "train_images": len(train.labels)}
    record["neighbors"] = NEIGHBORS
    for name, predict in {"linear_probe": linear_probe, "nearest_neighbors": nearest_neighbors}.items():
        correct = predict(train.features, train.labels, test.features) == test.labels
        record[name] = metrics.proportion(int(correct.sum()), len(correct))
    return record, _map(subject)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Return the classes that multinomial logistic regression predicts for features, int64 [M].

    The features are standardized. The penalty is that of scikit-learn's default, C=1.

    Args:
        train, labels: the features and labels of the training images, [N, D] and int64 [N].
        test: features, [M, D].
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return torch.from_numpy(probe.fit(train.numpy(), labels.numpy()).predict(test.numpy()))


def nearest_neighbors(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Return the most frequent class among the nearest training images by cosine similarity, int64 [M].

    Of equally frequent classes, the first is returned. The arguments are those of `linear_probe`.
    """
    train, count = F.normalize(train).T, min(NEIGHBORS, len(labels))
    chunks = tqdm(F.normalize(test).split(500), "nearest neighbors", leave=False, disable=None)
    return torch.cat([F.one_hot(labels[(chunk @ train).topk(count).indices]).sum(1).argmax(1) for chunk in chunks])


def _map(subject: Subject) -> dict[str, Figure]:
    """Draw a t-SNE map (van der Maaten and Hinton, 2008) of test images; none for a few, or for constant features."""
    from sklearn.manifold import TSNE

    test, seed = subject.test_features, subject.config.seed
    chosen = torch.randperm(len(test.labels), generator=generator(seed, 0, "map"))[:MOST_IN_MAP]
    features = F.normalize(test.features[chosen])
    if len(chosen) < 4 or int((features.std(0) > 0).sum()) < 2:
        return {}
    with tqdm(total=1, desc="map of the features", leave=False, disable=None):
        tsne = TSNE(perplexity=min(30, len(chosen) / 4), random_state=seed)
        positions = tsne.fit_transform(features.numpy())
    images = subject.data.source.test[test.index[chosen]].images
    labels = test.labels[chosen].numpy()
    return {"feature_map": figures.feature_map(positions, labels, images, subject.data.class_names)}
