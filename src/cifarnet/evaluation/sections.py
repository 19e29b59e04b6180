"""The sections of an evaluation. Each function returns a part of the record, and the figures that belong to it."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cifarnet.data import ImageDataModule
from cifarnet.evaluation import adversarial, conformal, features, figures, members, metrics, ood, robustness, selective
from cifarnet.evaluation.predictions import per_image
from cifarnet.evaluation.public_sets import CIFAR10_C_EXTRA, PublicSets
from cifarnet.evaluation.subject import Section, Subject
from cifarnet.inference import figures as inference_figures
from cifarnet.inference.ensemble import Ensemble
from cifarnet.inference.predictor import Batches, Predictions, Predictor
from cifarnet.records.tables import percent

NUM_MISTAKES = 20  # the number of mistakes in the report
NUM_PAIRS, IMAGES_PER_PAIR = 5, 6  # confused pairs of classes in the report, and the images of each pair


def measure(predictor: Predictor | Ensemble, data: ImageDataModule, public: PublicSets, config: DictConfig) -> Section:
    """Return the contents of all sections, and the `predictions` for the test images.

    Args:
        public: the public test sets to evaluate on.
        config: the settings in `configs/evaluate.yaml`.

    Raises:
        UserError: the network's outputs are not finite, or a setting cannot be used.
    """
    test = predictor.predict_all(data.test_dataloader(), "test")
    val = predictor.predict_all(batches, "validation") if (batches := data.val_dataloader()) else None
    subject = Subject(predictor, data, public, config, test, val)
    record, drawn = _on_test_images(subject)
    for name, section in SECTIONS.items():
        record[name], figures = section(subject)
        drawn |= figures
    return record | {"predictions": per_image(test, data)}, drawn


def _on_test_images(subject: Subject) -> Section:
    """Return accuracy, calibration and mistakes on the test images. The temperature is fitted on validation images."""
    data, test, val, humans = subject.data, subject.test, subject.val, subject.public.cifar10h
    names, images, num_images = data.class_names, data.source.test.images, len(test.labels)
    summary, bins = metrics.summary(test.logits, test.labels), metrics.bins(test.logits, test.labels)
    panels = {f"as trained: error {percent(summary['calibration_error'], num_images)}": bins}
    temperature = scaled = None
    if val is not None:
        temperature = metrics.fit_temperature(val.logits, val.labels)
        scaled = metrics.calibration(test.logits, test.labels, temperature)
        title = f"temperature {temperature:.2f}: error {percent(scaled['calibration_error'], num_images)}"
        panels[title] = metrics.bins(test.logits, test.labels, temperature)
    confusion = multiclass_confusion_matrix(test.logits.argmax(1), test.labels, num_classes=len(names))
    classes = metrics.by_class(confusion, names)
    mistakes = _mistakes(test, names, range(len(names)), NUM_MISTAKES)
    record = {
        "test": summary,
        "test_accuracy_one_view": metrics.accuracy(test.one_view, test.labels),
        "val": metrics.summary(val.one_view, val.labels) if val else None,
        "temperature": temperature,
        "test_with_temperature": scaled,
        "calibration_bins": bins,
        "classes": classes,
        "macro_f1": torch.tensor([row["f1"] for row in classes], dtype=torch.float64).nanmean().item(),
        "confusion": confusion.tolist(),
        "mistakes": mistakes,
        "cifar10h": None if humans is None else metrics.against_humans(test.logits, humans[test.index], temperature),
    }
    drawn = {"confusion": inference_figures.confusion(confusion, names), "reliability": figures.reliability(panels)}
    if mistakes:
        drawn["mistakes"] = inference_figures.mistakes(images, mistakes, "The most confident mistakes", 5)
    return record, drawn | _confused_pairs(subject, confusion)


def _confused_pairs(subject: Subject, confusion: Tensor) -> dict[str, Figure]:
    """Draw the most confident mistakes between the two classes of each of the most frequently confused pairs."""
    names, images, drawn = subject.data.class_names, subject.data.source.test.images, {}
    between = (confusion + confusion.T).triu(1)
    order = between[between > 0].argsort(descending=True, stable=True)[:NUM_PAIRS]
    for rank, (a, b) in enumerate(between.nonzero()[order].tolist(), 1):
        title = "    ".join(f"{names[i]} → {names[j]}: {confusion[i, j]:,}" for i, j in ((a, b), (b, a)))
        rows = _mistakes(subject.test, names, (a, b), IMAGES_PER_PAIR)
        drawn[f"confused_{rank}"] = inference_figures.mistakes(images, rows, title, IMAGES_PER_PAIR)
    return drawn


def _corruptions(subject: Subject) -> Section:
    """Return the accuracy on corrupted test images."""
    if not subject.config.corruptions:
        return None, {}
    data, seed, num_images = subject.data, subject.config.seed, len(subject.test.labels)
    table = _table(subject.predictor, robustness.corrupted(data.test_dataloader(), seed))
    mean, clean = fmean(map(fmean, table.values())), metrics.accuracy(subject.test.logits, subject.test.labels)
    levels = {name: list(levels) for name, (_, levels) in robustness.CORRUPTIONS.items()}
    title = f"Accuracy under corruption: mean {percent(mean, num_images)}, clean {percent(clean, num_images)}"
    examples = robustness.examples(data.source.test.images[0], seed)
    drawn = {"corruptions": figures.robustness(table, title), "corruption_examples": figures.severities(examples)}
    return {"mean": mean, "accuracy": table, "levels": levels}, drawn


def _cifar10_c(subject: Subject) -> Section:
    if subject.public.cifar10_c is None:
        return None, {}
    table = _table(subject.predictor, subject.public.cifar10_c)
    averaged = {name: row for name, row in table.items() if name not in CIFAR10_C_EXTRA} or table
    mean = fmean(map(fmean, averaged.values()))
    drawn = {"cifar10_c": figures.robustness(table, f"CIFAR-10-C: mean accuracy {mean:.1%}")}
    return {"mean": mean, "averaged": list(averaged), "accuracy": table}, drawn


def _cifar10_1(subject: Subject) -> Section:
    if subject.public.cifar10_1 is None:
        return None, {}
    found = {name: subject.predictor.predict_all(batches, name) for name, batches in subject.public.cifar10_1.items()}
    return {name: metrics.summary(part.logits, part.labels) for name, part in found.items()}, {}


def _mistakes(test: Predictions, names: Sequence[str], classes: Sequence[int], most: int) -> list[dict[str, Any]]:
    """Return the wrong predictions with the highest confidence, whose true and predicted class are among `classes`."""
    confidence, predicted = test.logits.double().softmax(1).max(1)
    among = torch.isin(torch.stack([predicted, test.labels]), torch.tensor(classes)).all(0)
    wrong = (among & (predicted != test.labels)).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:most]
    columns = (column[wrong].tolist() for column in (test.index, test.labels, predicted, confidence))
    return [
        {"index": index, "class": names[label], "predicted": names[guess], "confidence": probability}
        for index, label, guess, probability in zip(*columns, strict=True)
    ]


def _table(predictor: Predictor | Ensemble, rows: Mapping[str, Sequence[Batches]]) -> dict[str, list[float]]:
    """Return the accuracy at each severity by row, and print each row when it is complete."""
    table = {}
    for name, row in rows.items():
        levels = [predictor.predict_all(batches, f"{name}, severity {i}") for i, batches in enumerate(row, 1)]
        table[name] = [metrics.accuracy(level.logits, level.labels) for level in levels]
        cells = (f"{percent(accuracy, len(levels[0].labels)):>7}" for accuracy in table[name])
        print(f"  {name:<18}", *cells, flush=True)
    return table


# by the name of the part in the record; figures appear in the report in the order of its template
SECTIONS: dict[str, Callable[[Subject], Section]] = {
    "members": members.section,
    "corruptions": _corruptions,
    "cifar10_c": _cifar10_c,
    "cifar10_1": _cifar10_1,
    "selective": selective.section,
    "conformal": conformal.section,
    "ood": ood.section,
    "adversarial": adversarial.section,
    "features": features.section,
}
