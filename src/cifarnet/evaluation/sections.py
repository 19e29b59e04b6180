"""The sections of an evaluation: each asks the network, and gives its part of the record and its figures."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cifarnet.data import ImageDataModule, InMemoryLoader, Split
from cifarnet.errors import UserError
from cifarnet.evaluation import figures, metrics, public_sets, robustness
from cifarnet.evaluation.predictor import Predictions, Predictor

MISTAKES = 20  # are shown

Section = tuple[dict[str, Any], dict[str, Figure]]  # plain data for the record, and figures by name


def measure(
    predictor: Predictor, datamodule: ImageDataModule, public: public_sets.PublicSets, noise_seed: int | None
) -> Section:
    """All sections: the test images, under corruption too unless `noise_seed` is None, and the public sets given.

    Raises:
        UserError: the network's answers are not finite.
    """
    batch_size = datamodule.eval_batch_size
    record, drawn = on_test_images(predictor, datamodule, public.cifar10h)
    record |= {"corruptions": None, "cifar10_c": None, "cifar10_1": None}
    if noise_seed is not None:
        clean = record["test"]["accuracy"]
        record["corruptions"], more = corruptions(predictor, datamodule, noise_seed, clean)
        drawn |= more
    if public.cifar10_c is not None:
        record["cifar10_c"], more = cifar10_c(predictor, public.cifar10_c, batch_size)
        drawn |= more
    if public.cifar10_1 is not None:
        record["cifar10_1"] = cifar10_1(predictor, public.cifar10_1, batch_size)
    return record, drawn


def on_test_images(predictor: Predictor, datamodule: ImageDataModule, people: Tensor | None) -> Section:
    """Accuracy, calibration and mistakes on the test images; the temperature comes from the validation images.

    `people`, float64 [N, num_classes], is how people label each test image.
    """
    names = datamodule.class_names
    test = predictor.over(datamodule.test_dataloader(), "test")
    if not test.logits.isfinite().all():
        raise UserError("The network's answers are not finite: its training diverged. Try a smaller optimizer.lr.")
    val, temperature, scaled = None, None, None
    if len(datamodule.source.val):
        val = predictor.over(datamodule.val_dataloader(), "validation")
        temperature = metrics.fit_temperature(val.logits, val.labels)
        scaled = metrics.calibration(test.logits, test.labels, temperature)
    confusion = multiclass_confusion_matrix(test.logits.argmax(1), test.labels, num_classes=len(names))
    mistakes, drawn = _mistakes(test, datamodule)
    record = {
        "test": metrics.summary(test.logits, test.labels),
        "test_accuracy_one_view": metrics.accuracy(test.one_view, test.labels),
        "val": metrics.summary(val.one_view, val.labels) if val else None,
        "temperature": temperature,
        "test_with_temperature": scaled,
        "calibration_bins": metrics.bins(test.logits, test.labels),
        "classes": metrics.by_class(confusion, names),
        "confusion": confusion.tolist(),
        "mistakes": mistakes,
        "cifar10h": None if people is None else metrics.against_people(test.logits, people[test.index], temperature),
    }
    panels = {f"as trained: error {record['test']['calibration_error']:.2%}": record["calibration_bins"]}
    if temperature and scaled:
        title = f"temperature {temperature:.2f}: error {scaled['calibration_error']:.2%}"
        panels[title] = metrics.bins(test.logits, test.labels, temperature)
    return record, drawn | {
        "confusion": figures.confusion(confusion, names),
        "reliability": figures.reliability(panels),
    }


def _mistakes(test: Predictions, datamodule: ImageDataModule) -> tuple[list[dict[str, Any]], dict[str, Figure]]:
    """The wrong answers that the network is most sure of."""
    confidence, predicted = test.logits.double().softmax(1).max(1)
    wrong = (predicted != test.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    if not len(wrong):
        return [], {}
    names, index = datamodule.class_names, test.index[wrong].tolist()
    columns = test.labels[wrong], predicted[wrong], confidence[wrong]
    images = torch.stack([datamodule.source.test.images[i] for i in index])
    listed = [
        {"index": i, "class": names[label], "predicted": names[guess], "confidence": sure}
        for i, label, guess, sure in zip(index, *(column.tolist() for column in columns), strict=True)
    ]
    return listed, {"mistakes": figures.mistakes(images, *columns, names)}


def corruptions(predictor: Predictor, datamodule: ImageDataModule, seed: int, clean: float) -> Section:
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
    drawn = {
        "corruptions": figures.robustness(table, f"Accuracy under corruption: mean {mean:.1%}, clean {clean:.1%}"),
        "corruption_examples": figures.severities(robustness.examples(datamodule.source.test.images[0], seed)),
    }
    return {"mean": mean, "accuracy": table, "levels": levels}, drawn


def cifar10_c(predictor: Predictor, splits: Mapping[str, list[Split]], batch_size: int) -> Section:
    """Accuracy on what `public_sets.read_cifar10_c` returned."""
    table = _table(predictor, {name: [_loader(block, batch_size) for block in splits[name]] for name in splits})
    averaged = {name: row for name, row in table.items() if name not in public_sets.CIFAR10_C_EXTRA} or table
    mean = _mean(averaged.values())
    figure = figures.robustness(table, f"CIFAR-10-C: mean accuracy {mean:.1%}")
    return {"mean": mean, "averaged": list(averaged), "accuracy": table}, {"cifar10_c": figure}


def cifar10_1(predictor: Predictor, splits: Mapping[str, Split], batch_size: int) -> dict[str, Any]:
    """Accuracy and calibration on what `public_sets.read_cifar10_1` returned."""
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
