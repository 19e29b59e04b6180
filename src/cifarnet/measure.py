"""What an evaluation asks the network, the figures that come of it, and their pictures."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cifarnet import metrics, report, robustness
from cifarnet.data import ImageDataModule, InMemoryLoader, Split
from cifarnet.errors import UserError
from cifarnet.inference import Predictions, Predictor

MISTAKES = 20  # are shown

Measured = tuple[dict[str, Any], dict[str, Figure]]  # plain data, and pictures by name


def on_test_images(predictor: Predictor, datamodule: ImageDataModule, people: Tensor | None) -> Measured:
    """Accuracy, calibration and mistakes on the test images; the temperature comes from the validation images.

    Args:
        people: how people label each test image, float64 [N, num_classes].

    Raises:
        UserError: the network's answers are not finite.
    """
    names = datamodule.class_names
    test = predictor.over(datamodule.test_dataloader(), "test")
    if not test.logits.isfinite().all():
        raise UserError("The network's answers are not finite: its training diverged. Try a smaller optimizer.lr.")
    val, temperature = None, None
    if len(datamodule.source.val):
        val = predictor.over(datamodule.val_dataloader(), "validation")
        temperature = metrics.fit_temperature(val.logits, val.labels)
    confusion = multiclass_confusion_matrix(test.logits.argmax(1), test.labels, num_classes=len(names))
    scaled = metrics.calibration(test.logits, test.labels, temperature) if temperature else None
    mistakes, pictures = _mistakes(test, datamodule)
    figures = {
        "test": metrics.summary(test.logits, test.labels),
        "test_accuracy_one_view": metrics.accuracy(test.one_view, test.labels),
        "val": metrics.summary(val.one_view, val.labels) if val else None,
        "temperature": temperature,
        "test_with_temperature": scaled,
        "calibration_bins": metrics.bins(test.logits, test.labels),
        "classes": metrics.by_class(confusion, names),
        "confusion": confusion.tolist(),
        "mistakes": mistakes,
        "cifar10h": None if people is None else metrics.against_people(test.logits, people, temperature),
    }
    panels = {f"as trained: error {figures['test']['calibration_error']:.2%}": figures["calibration_bins"]}
    if temperature:
        title = f"temperature {temperature:.2f}: error {scaled['calibration_error']:.2%}"
        panels[title] = metrics.bins(test.logits, test.labels, temperature)
    pictures |= {"confusion": report.confusion(confusion, names), "reliability": report.reliability(panels)}
    return figures, pictures


def _mistakes(test: Predictions, datamodule: ImageDataModule) -> tuple[list[dict[str, Any]], dict[str, Figure]]:
    """The wrong answers that the network is most sure of."""
    confidence, predicted = test.logits.double().softmax(1).max(1)
    wrong = (predicted != test.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    if not len(wrong):
        return [], {}
    names, columns = datamodule.class_names, (test.labels[wrong], predicted[wrong], confidence[wrong])
    images = torch.stack([datamodule.source.test.images[i] for i in wrong.tolist()])
    rows = zip(wrong.tolist(), *(column.tolist() for column in columns), strict=True)
    listed = [
        {"index": i, "class": names[label], "predicted": names[guess], "confidence": sure}
        for i, label, guess, sure in rows
    ]
    return listed, {"mistakes": report.mistakes(images, *columns, names)}


def corruptions(predictor: Predictor, datamodule: ImageDataModule, seed: int, clean: float) -> Measured:
    """Accuracy on the test images under every corruption; `clean` is that without."""
    batches, severities = datamodule.test_dataloader(), range(1, robustness.SEVERITIES + 1)
    table = _table(
        predictor,
        {
            name: [robustness.Corrupted(batches, name, severity, seed) for severity in severities]
            for name in robustness.CORRUPTIONS
        },
    )
    mean = _mean(table.values())
    levels = {name: list(corruption.levels) for name, corruption in robustness.CORRUPTIONS.items()}
    pictures = {
        "corruptions": report.robustness(table, f"Accuracy under corruption: mean {mean:.1%}, clean {clean:.1%}"),
        "corruption_examples": report.severities(robustness.examples(datamodule.source.test.images[0], seed)),
    }
    return {"mean": mean, "accuracy": table, "levels": levels}, pictures


def cifar10_c(predictor: Predictor, splits: Mapping[str, list[Split]], batch_size: int) -> Measured:
    """Accuracy on what `robustness.read_cifar10_c` returned."""
    table = _table(predictor, {name: [_loader(block, batch_size) for block in splits[name]] for name in splits})
    averaged = {name: row for name, row in table.items() if name not in robustness.CIFAR10_C_EXTRA} or table
    mean = _mean(averaged.values())
    picture = report.robustness(table, f"CIFAR-10-C: mean accuracy {mean:.1%}")
    return {"mean": mean, "averaged": list(averaged), "accuracy": table}, {"cifar10_c": picture}


def cifar10_1(predictor: Predictor, splits: Mapping[str, Split], batch_size: int) -> dict[str, Any]:
    """Accuracy and calibration on what `robustness.read_cifar10_1` returned."""
    answers = {name: predictor.over(_loader(split, batch_size), name) for name, split in splits.items()}
    return {name: metrics.summary(predictions.logits, predictions.labels) for name, predictions in answers.items()}


def _loader(split: Split, batch_size: int) -> InMemoryLoader:
    return InMemoryLoader(split.images, split.labels, batch_size)


def _table(predictor: Predictor, rows: Mapping[str, Iterable[Any]]) -> dict[str, list[float]]:
    """The accuracy on each set of batches; a line is printed when those of a row are known."""
    table = {}
    for name, loaders in rows.items():
        table[name] = []
        for severity, batches in enumerate(loaders, 1):
            answers = predictor.over(batches, f"{name}, severity {severity}")
            table[name].append(metrics.accuracy(answers.logits, answers.labels))
        print(f"  {name:<18}", *(f"{accuracy:7.2%}" for accuracy in table[name]), flush=True)
    return table


def _mean(rows: Iterable[list[float]]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values)
