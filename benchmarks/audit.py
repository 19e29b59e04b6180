"""The wrong labels and near-duplicates that `python -m cifarnet.audit` finds.

    python benchmarks/audit.py [--turns 3] [--folds 5] [--noise 0.1] -- [data=folder data.root=…] [settings of the runs]

For each seed, a tenth of the training labels are made wrong (`data.label_noise`), and the baseline is trained on all
images, and without each fold. The table shows, for each score, the precision among as many images as there are wrong
labels, the average precision, and the share of wrong labels for which the true class is suggested. `cleanlab` is
confident learning alone: the out-of-fold probabilities with its other score, and the images that `find_label_issues`
returns. "out_of_fold, as many" are as many images with the highest score, whose labels an audit replaces; the precision
of both is that among these images. The command continues where it was stopped.

With these files, the benchmark also trains on CIFAR-10 as it is, and counts how many of the first 200 test images are
in published lists. Download the lists yourself:

    --label-errors cifar10_mturk.json           https://github.com/cleanlab/label-errors (Northcutt et al., 2021)
    --near-duplicates duplicates_cifar10.csv    https://github.com/cvjena/cifair (Barz and Denzler, 2020)
    --official labels.bin                       for data=folder, whose images are sorted by class: the 60,000 labels in
                                                the order of the official files, a byte each
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

import cifarnet
import common
from cifarnet.auditing import networks, scores
from cifarnet.build import make_data
from cifarnet.cli import compose, literal
from cifarnet.data import ImageDataModule
from cifarnet.data.subsets import Selection

RANKED = ("forgetting", "negative_aum", "hardness", "el2n")  # the scores whose ranks the row "mean rank" combines
FIRST = 200  # the number of test images to look up in the published lists


def read_data(experiment: str, overrides: Sequence[str]) -> ImageDataModule:
    """Return a data module with all training images, in the order of the data set."""
    data = make_data(compose("train", [f"+experiment={experiment}", "output_dir=/nowhere", *overrides]))
    data.val_fraction, data.folds = 0, None
    return data


def train(folder: Path, experiment: str, *overrides: str) -> Path:
    """Train a run with its dynamics, unless it is finished, and return its folder; an interrupted run is resumed."""
    command = [sys.executable, "-m", "cifarnet.train"]
    if (folder / "checkpoints/last.ckpt").exists():
        command.append(f"ckpt_path={literal(str(folder))}")
    else:
        command += [f"+experiment={experiment}", "callbacks=dynamics", "callbacks.pictures=null", "~logger"]
        command += [*overrides, f"hydra.run.dir={literal(str(folder))}"]
    if not (folder / "metrics.json").exists():
        print(f"{folder}: training", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((folder / "metrics.json").read_text())
    print(f"{folder}: test accuracy {metrics['test_accuracy']:.2%}, {metrics['seconds']:.0f} s", flush=True)
    return folder


def plant(file: Path, true: torch.Tensor, num_classes: int, noise: float, seed: int) -> np.ndarray:
    """Write the labels that data.label_noise would give to a run on all images, and return them."""
    selected = Selection(val_fraction=0, split_seed=seed, label_noise=noise).select(true, num_classes)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(file, selected.labels.numpy(), "%d")
    return selected.labels.numpy()


def quality(suspicion: np.ndarray, is_wrong: np.ndarray) -> dict[str, float]:
    """Return the precision among as many images as there are wrong labels, and the average precision."""
    first = np.argsort(-suspicion, kind="stable")[: is_wrong.sum()]
    return {"precision": is_wrong[first].mean(), "average precision": average_precision_score(is_wrong, suspicion)}


def measure(
    data: ImageDataModule, whole: Path, folds: Sequence[Path], given: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return the quality of each score for one seed, among the images that were used (each epoch drops a few)."""
    true, rows = data.source.train.labels.numpy(), {}
    for suffix, folders in {"": [whole], ", folds": folds}.items():
        runs = list(scores.read(folders).values())
        scored = scores.combine(runs)
        assert np.array_equal(scored.given, given[scored.index])
        is_wrong = scored.given != true[scored.index]
        rows |= {f"{name}{suffix}": quality(score, is_wrong) for name, score in scored.values.items()}
        mean_rank = np.mean([rankdata(scored.values[name]) for name in RANKED], axis=0)
        rows[f"mean rank{suffix}"] = quality(mean_rank, is_wrong)
        if suffix:
            predictors = [last(folder).predictor(tta="none") for folder in folders]
            probabilities = networks.confident_learning(scored, runs, predictors, data)
            assert probabilities is not None
            rows["out_of_fold"] = quality(scored.values["out_of_fold"], is_wrong)
            margin = get_label_quality_scores(scored.given, probabilities, method="normalized_margin")
            rows["cleanlab, normalized margin"] = quality(-margin, is_wrong)
            found = find_label_issues(scored.given, probabilities, n_jobs=1)
            precision, recall = is_wrong[found].mean(), found[is_wrong].mean()
            rows["cleanlab, find_label_issues"] = {"precision": precision, "recall": recall, "found": found.sum()}
            first = is_wrong[scored.ranked[: scored.count]]
            rows["out_of_fold, as many"] = {"precision": first.mean(), "recall": first.sum() / is_wrong.sum()}
        is_right = scored.suggested == true[scored.index]
        rows[scored.order]["suggestions"] = is_right[is_wrong].mean()  # of negative_aum, and of out_of_fold
    return {name: {key: float(value) for key, value in row.items()} for name, row in rows.items()}


def last(run: Path) -> Any:
    return cifarnet.load(run / "checkpoints/last.ckpt")


def official_index(labels: np.ndarray, official: np.ndarray | None) -> np.ndarray:
    """Return the position of each image in the official order."""
    if official is None or np.array_equal(official, labels):
        return np.arange(len(labels))
    order = np.argsort(official, kind="stable")
    if not np.array_equal(official[order], labels):
        sys.exit("The data is neither in the official order nor sorted by class.")
    return order


def look_up(data: ImageDataModule, runs: Sequence[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how many of the first test images are in the published lists."""
    train, test, facts = data.source.train, data.source.test, {}
    official = None if arguments.official is None else np.fromfile(arguments.official, np.uint8)
    index = official_index(test.labels.numpy(), None if official is None else official[len(train) :])
    train_index = official_index(train.labels.numpy(), None if official is None else official[: len(train)])
    if arguments.label_errors:
        rows = json.loads(arguments.label_errors.read_text())
        errors = {row["id"] for row in rows if row["mturk"]["given"] < 3}  # of five people
        means: Any = 0
        for run in runs:  # networks that were not trained on the test images, as in confident learning
            predictor = last(run).predictor(tta="none")
            means = means + torch.cat([predictor(chunk)[0].double().softmax(1).cpu() for chunk in test.chunks()])
        probabilities = (means / len(runs)).numpy()
        suspicion = 1 - get_label_quality_scores(test.labels.numpy(), probabilities)
        first = index[np.argsort(-suspicion, kind="stable")[:FIRST]]
        count = sum(position in errors for position in first.tolist())
        facts["label errors"] = f"{count} of the {len(errors)} published ones are among the first {FIRST} test images"
    if arguments.near_duplicates:
        lines = list(csv.DictReader(arguments.near_duplicates.read_text().splitlines()))
        published = {(int(row["TrainID"]), int(row["TestID"])): int(row["Judgment"]) for row in lines}
        pairs = networks.near_duplicates(last(runs[0]).predictor(tta="none"), data, FIRST)
        found = [published.get((int(train_index[i]), int(index[j]))) for _, i, j in pairs]
        tests = {test_id for _, test_id in published}
        count = sum(judgment is not None for judgment in found)
        near = sum(judgment is not None and judgment < 2 for judgment in found)
        listed = sum(int(index[j]) in tests for _, _, j in pairs)
        facts["near-duplicates"] = (
            f"{count} of the first {FIRST} pairs are published ({near} duplicates, {count - near} very similar); "
            f"{listed} of their test images are in the list of {len(tests)}"
        )
    return facts


def main() -> None:
    parser = common.parser(__doc__, turns=3)
    parser.add_argument("--experiment", default="baseline")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.1, help="the share of wrong labels")
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs/audit"), help="the folder of the runs")
    for name in ("official", "label-errors", "near-duplicates"):
        parser.add_argument(f"--{name}", type=Path)
    arguments = parser.parse_args()
    experiment, overrides = arguments.experiment, arguments.overrides
    data = read_data(experiment, overrides)
    true, num_classes = data.source.train.labels, len(data.class_names)
    measured: dict[str, dict[str, list[float]]] = {}
    for seed in range(arguments.turns):
        folder = (arguments.folder / f"seed{seed}").absolute()
        given = plant(folder / "labels.txt", true, num_classes, arguments.noise, seed)
        settings = [f"data.labels={literal(str(folder / 'labels.txt'))}", f"seed={seed}", *overrides]
        whole = train(folder / "whole", experiment, "data.val_fraction=0", *settings)
        numbers = range(arguments.folds)
        of_fold = [[f"data.folds={arguments.folds}", f"data.fold={number}", *settings] for number in numbers]
        folds = [train(folder / f"fold{number}", experiment, *of_fold[number]) for number in numbers]
        for name, row in measure(data, whole, folds, given).items():
            for key, value in row.items():
                measured.setdefault(name, {}).setdefault(key, []).append(value)
        print(*(f"seed {seed}: {name}: {row}" for name, row in measured.items()), sep="\n", flush=True)
    settings = " ".join(setting for setting in overrides if not setting.startswith("data.root="))
    facts: dict[str, Any] = {
        "settings": f"+experiment={experiment} {settings}",
        "seeds": arguments.turns,
        "folds": arguments.folds,
    }
    facts["wrong labels"] = f"{int((given != true.numpy()).sum()):,} of {len(true):,} for each seed"
    if arguments.label_errors or arguments.near_duplicates:
        seeds = range(arguments.turns)
        folders = [arguments.folder.absolute() / f"seed{seed}/as_it_is" for seed in seeds]
        runs = [train(folders[seed], experiment, "data.val_fraction=0", f"seed={seed}", *overrides) for seed in seeds]
        facts |= look_up(data, runs, arguments)
    print("\n| score | precision at the number of wrong labels, % | average precision, % | right suggestions, % |")
    print("| --- | ---: | ---: | ---: |")
    for name, row in measured.items():
        columns = ("precision", "average precision", "suggestions")
        cells = [common.mean_and_deviation(row[key]) if key in row else "" for key in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    for key in ("recall", "found"):
        facts[f"find_label_issues, {key}"] = statistics.mean(measured["cleanlab, find_label_issues"][key])
    values = {name: row["precision"] for name, row in measured.items()}
    common.report("audit", "precision at the number of wrong labels", values, **facts, measured=measured)


if __name__ == "__main__":
    main()
