"""The sections of an evaluation: each asks the network, and gives its part of the record and its figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cifarnet.data import ImageDataModule
from cifarnet.errors import UserError
from cifarnet.evaluation import figures, metrics, public_sets, robustness
from cifarnet.inference import figures as predicted_figures
from cifarnet.inference.predictor import Predictions, Predictor

MISTAKES = 20  # are shown

# plain data for the record, and what draws the figures, by name
Section = tuple[dict[str, Any], dict[str, Callable[[], Figure]]]


def measure(
    predictor: Predictor, datamodule: ImageDataModule, public: public_sets.PublicSets, noise_seed: int | None
) -> Section:
    """All sections: the test images, under corruption too unless `noise_seed` is None, and the public sets given.

    Raises:
        UserError: the network's answers are not finite.
    """
    record, drawn = _on_test_images(predictor, datamodule, public.cifar10h)
    record |= {"corruptions": None, "cifar10_c": None, "cifar10_1": None}
    if noise_seed is not None:
        table = _table(predictor, robustness.corrupted(datamodule.test_dataloader(), noise_seed))
        mean, clean = _mean(table.values()), record["test"]["accuracy"]
        levels = {name: list(levels) for name, (_, levels) in robustness.CORRUPTIONS.items()}
        record["corruptions"] = {"mean": mean, "accuracy": table, "levels": levels}
        title = f"Accuracy under corruption: mean {mean:.1%}, clean {clean:.1%}"
        drawn["corruptions"] = partial(figures.robustness, table, title)
        examples = robustness.examples(datamodule.source.test.images[0], noise_seed)
        drawn["corruption_examples"] = partial(figures.severities, examples)
    if public.cifar10_c is not None:
        table = _table(predictor, public.cifar10_c)
        averaged = {name: row for name, row in table.items() if name not in public_sets.CIFAR10_C_EXTRA} or table
        mean = _mean(averaged.values())
        record["cifar10_c"] = {"mean": mean, "averaged": list(averaged), "accuracy": table}
        drawn["cifar10_c"] = partial(figures.robustness, table, f"CIFAR-10-C: mean accuracy {mean:.1%}")
    if public.cifar10_1 is not None:
        answers = {version: predictor.over(batches, version) for version, batches in public.cifar10_1.items()}
        record["cifar10_1"] = {version: metrics.summary(of.logits, of.labels) for version, of in answers.items()}
    return record, drawn


def _on_test_images(predictor: Predictor, datamodule: ImageDataModule, people: Tensor | None) -> Section:
    """Accuracy, calibration and mistakes on the test images; the temperature comes from the validation images."""
    names = datamodule.class_names
    test = predictor.over(datamodule.test_dataloader(), "test")
    if not test.logits.isfinite().all():
        raise UserError("The network's answers are not finite: its training diverged. Try a smaller optimizer.lr.")
    summary, bins = metrics.summary(test.logits, test.labels), metrics.bins(test.logits, test.labels)
    panels = {f"as trained: error {summary['calibration_error']:.2%}": bins}
    val = temperature = scaled = None
    if len(datamodule.source.val):
        val = predictor.over(datamodule.val_dataloader(), "validation")
        temperature = metrics.fit_temperature(val.logits, val.labels)
        scaled = metrics.calibration(test.logits, test.labels, temperature)
        title = f"temperature {temperature:.2f}: error {scaled['calibration_error']:.2%}"
        panels[title] = metrics.bins(test.logits, test.labels, temperature)
    confusion = multiclass_confusion_matrix(test.logits.argmax(1), test.labels, num_classes=len(names))
    mistakes = _mistakes(test, names)
    record = {
        "test": summary,
        "test_accuracy_one_view": metrics.accuracy(test.one_view, test.labels),
        "val": metrics.summary(val.one_view, val.labels) if val else None,
        "temperature": temperature,
        "test_with_temperature": scaled,
        "calibration_bins": bins,
        "classes": metrics.by_class(confusion, names),
        "confusion": confusion.tolist(),
        "mistakes": mistakes,
        "cifar10h": None if people is None else metrics.against_people(test.logits, people[test.index], temperature),
    }
    drawn = {
        "confusion": partial(predicted_figures.confusion, confusion, names),
        "reliability": partial(figures.reliability, panels),
    }
    if mistakes:
        images = torch.stack([datamodule.source.test.images[row["index"]] for row in mistakes])
        drawn["mistakes"] = partial(predicted_figures.mistakes, images, mistakes)
    return record, drawn


def _mistakes(test: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    """The wrong answers that the network is most sure of."""
    confidence, predicted = test.logits.double().softmax(1).max(1)
    wrong = (predicted != test.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    columns = (column[wrong].tolist() for column in (test.index, test.labels, predicted, confidence))
    return [
        {"index": index, "class": names[label], "predicted": names[guess], "confidence": sure}
        for index, label, guess, sure in zip(*columns, strict=True)
    ]


def _table(predictor: Predictor, rows: Mapping[str, Sequence[Iterable]]) -> dict[str, list[float]]:
    """The accuracy on each set of batches; a line is printed when those of a row are known."""
    table = {}
    for name, row in rows.items():
        answers = (predictor.over(batches, f"{name}, severity {severity}") for severity, batches in enumerate(row, 1))
        table[name] = [metrics.accuracy(of.logits, of.labels) for of in answers]
        print(f"  {name:<18}", *(f"{accuracy:7.2%}" for accuracy in table[name]), flush=True)
    return table


def _mean(rows: Iterable[list[float]]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values)
