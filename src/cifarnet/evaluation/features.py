"""Features, the inputs of a network's last layer: their quality, and a map of the test images.

scikit-learn is imported only where it is used, because it is optional.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cifarnet.evaluation import figures, metrics
from cifarnet.evaluation.subject import Section, Subject
from cifarnet.seeding import generator
from cifarnet.system import files

NEIGHBORS = 20
MOST_IN_MAP = 2000  # the largest number of images in the map


def section(subject: Subject) -> Section:
    """Write `features.npz`; return the accuracy of a linear probe and of nearest neighbors, and a map of the features.

    The map is that of t-SNE (van der Maaten and Hinton, 2008).
    """
    if not subject.config.features:
        return None, {}
    from sklearn.manifold import TSNE

    (train, test), names = subject.features, subject.data.class_names
    with files.atomic_file(Path(subject.config.output_dir) / "features.npz") as file:
        np.savez(file, features=test.features, logits=test.logits, labels=test.labels, class_names=names)
    record: dict[str, Any] = {"dimensions": test.features.shape[1], "neighbors": min(NEIGHBORS, len(train.labels))}
    for name, classifier in tqdm(classifiers(record["neighbors"]).items(), "classifiers", leave=False, disable=None):
        classifier.fit(train.features.numpy(), train.labels.numpy())
        correct = classifier.predict(test.features.numpy()) == test.labels.numpy()
        record[name] = metrics.proportion(int(correct.sum()), len(correct))
    chosen = torch.randperm(len(test.labels), generator=generator(subject.config.seed, 0, "map"))[:MOST_IN_MAP]
    tsne = TSNE(perplexity=min(30, len(chosen) / 4), random_state=subject.config.seed)
    positions = tsne.fit_transform(F.normalize(test.features[chosen]).numpy())
    return record, {"feature_map": figures.feature_map(positions, subject.data.source.test[chosen], names)}


def classifiers(neighbors: int = NEIGHBORS) -> dict[str, Any]:
    """Return classifiers of features with the interface of scikit-learn, by their names in the record.

    - linear_probe: multinomial logistic regression on standardized features, with scikit-learn's default penalty, C=1
    - nearest_neighbors: the most frequent class among the nearest training images by cosine similarity; of equally
      frequent classes, the first

    Args:
        neighbors: the number of nearest training images; at most the number of all of them.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return {"linear_probe": probe, "nearest_neighbors": KNeighborsClassifier(neighbors, metric="cosine")}
