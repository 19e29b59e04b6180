"""What the networks of the runs compute: out-of-fold probabilities, and the similarity of images by their features."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cifarnet.auditing.scores import Dynamics, Scored, best_other
from cifarnet.data import ImageDataModule
from cifarnet.inference.predictor import Predictor

CHUNK = 250  # the number of test images that are compared at once
Pair = tuple[float, int, int]  # the similarity, and the positions in the training images and in the test images


def confident_learning(
    scored: Scored, runs: Sequence[Dynamics], predictors: Sequence[Predictor], data: ImageDataModule
) -> np.ndarray | None:
    """Add the score `out_of_fold`, its suggestions, and the number of wrong labels according to confident learning
    (Northcutt et al., 2021, https://arxiv.org/abs/1911.00068), if each image was left out by a run, as with all folds.

    The score is 1 minus the probability of the label according to the networks that were not trained on the image.

    Args:
        predictors: the networks of the runs, without test-time augmentation.
        data: a data module with all training images of the data set.

    Returns:
        The mean probabilities of these networks, float64 [N, num_classes]; None if all runs used an image.
    """
    left_out = [np.isin(scored.index, run["index"], invert=True) for run in runs]
    if not (times := np.sum(left_out, 0)).all():
        if times.any():
            problem = f"all runs with checkpoints were trained on {(times == 0).sum():,} of the images"
            remedy = f"The images are ranked by {scored.order}. Audit the runs of all folds, with their checkpoints"
            print(f"No out-of-fold probabilities, because {problem}. {remedy}.")
        return None
    from cleanlab.filter import find_label_issues

    sums = np.zeros((len(times), len(runs[0]["class_names"])))
    for rows, predictor in zip(left_out, predictors, strict=True):
        if rows.any():
            images = data.source.train[torch.from_numpy(scored.index[rows])]
            predicted = predictor.predict_all(data.loader(images, data.eval_batch_size), "images that a run left out")
            sums[rows] += predicted.logits.double().softmax(1).numpy()
    probabilities = sums / times[:, None]
    scored.values["out_of_fold"] = 1 - probabilities[np.arange(len(times)), scored.given]
    scored.suggested, scored.order = best_other(probabilities, scored.given), "out_of_fold"
    scored.agreement = float((probabilities.argmax(1) == scored.given).mean())
    scored.count = int(find_label_issues(scored.given, probabilities, n_jobs=1).sum())
    return probabilities


def near_duplicates(predictor: Predictor, data: ImageDataModule, most: int) -> list[Pair]:
    """Find the most similar training image of each test image, by the cosine similarity of their features, and return
    the `most` pairs of highest similarity.

    Barz and Denzler (2020, https://arxiv.org/abs/1902.00423) found the near-duplicates in CIFAR-10 in this way.
    """
    loaders = data.loader(data.source.train, data.eval_batch_size), data.test_dataloader()
    train, test = (F.normalize(predictor.embed(loader, "features").features) for loader in loaders)
    chunks = tqdm(test.split(CHUNK), "near-duplicates", leave=False, disable=None)
    matches = [(chunk @ train.T).max(1) for chunk in chunks]
    best, nearest = (torch.cat(parts) for parts in zip(*matches, strict=True))
    chosen = best.argsort(descending=True, stable=True)[:most]
    return list(zip(best[chosen].tolist(), nearest[chosen].tolist(), chosen.tolist(), strict=True))
