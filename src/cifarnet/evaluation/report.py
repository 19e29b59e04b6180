"""The summary of an evaluation for the terminal, and its report, a single HTML page that works offline."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cifarnet.evaluation import members
from cifarnet.evaluation.public_sets import CIFAR10_C_EXTRA
from cifarnet.inference.figures import MANY
from cifarnet.records.evaluation import Evaluation, Summary
from cifarnet.records.tables import decimals, percent


def summary(evaluation: Evaluation) -> dict[str, str]:
    """Return the main results by name."""
    test, val, scaled = evaluation.test, evaluation.val, evaluation.test_with_temperature
    images = test["images"]
    rows = {"test accuracy": _accuracy(test)}
    if evaluation.tta != "none":
        one_view = percent(evaluation.test_accuracy_one_view, images)
        rows["without augmentation"] = f"{one_view}  (the test uses tta={evaluation.tta})"
    if evaluation.members:
        part = evaluation.members["disagreement"]
        rows["disagreement"] = f"{_accuracy({**part, 'accuracy': part['share']})}, mean over pairs of runs"
    trained = "the runs together trained" if evaluation.members else "trained"
    rows["validation accuracy"] = _accuracy(val) if val else f"none  ({trained} on all images)"
    for k in (2, 5):
        if (accuracy := test.get(f"top{k}_accuracy")) is not None:
            rows[f"top-{k} accuracy"] = percent(accuracy, images)
    for name, key, form in [
        ("calibration error", "calibration_error", f".{decimals(images)}%"),
        ("cross-entropy", "cross_entropy", ".4f"),
        ("Brier score", "brier", ".4f"),
    ]:
        rows[name] = format(test[key], form)
        if scaled:
            rows[name] += f"  ({scaled[key]:{form}} with temperature {evaluation.temperature:.3f})"
    hardest = sorted((row for row in evaluation.classes if row["images"]), key=lambda row: row["accuracy"])[:3]
    rows["hardest classes"] = ", ".join(f"{row['name']} {percent(row['accuracy'], row['images'])}" for row in hardest)
    if selective := evaluation.selective:
        rows["90% most confident"] = _accuracy(next(row for row in selective["coverages"] if row["coverage"] >= 0.9))
    if conformal := evaluation.conformal:
        sets = conformal["sets"]["LAC"]
        rows["conformal coverage"] = _accuracy(sets | {"accuracy": sets["coverage"]})
        rows["conformal set size"] = f"{sets['mean_size']:.2f}  (mean; LAC, alpha={conformal['alpha']:g})"
    if corruptions := evaluation.corruptions:
        rows["under corruption"] = f"{percent(corruptions['mean'], images)}  (mean; not comparable with CIFAR-10-C)"
    if cifar10_c := evaluation.cifar10_c:
        rows["CIFAR-10-C"] = f"{cifar10_c['mean']:.2%}  (mean of {len(cifar10_c['averaged'])} corruptions)"
    rows |= {f"CIFAR-10.1 {version}": _accuracy(part) for version, part in (evaluation.cifar10_1 or {}).items()}
    for name, scores in (evaluation.ood or {}).items():
        areas = (f"{percent(row['auroc'], row['images'])} by {score}" for score, row in scores.items())
        rows[f"AUROC, {name}"] = ", ".join(areas)
    if features := evaluation.features:
        rows["linear probe"] = _accuracy(features["linear_probe"])
        rows[f"{features['neighbors']} nearest neighbors"] = _accuracy(features["nearest_neighbors"])
    if attacked := evaluation.adversarial:
        rows |= {title: _accuracy(part) for title, part in attacked["accuracy"].items()}
        signs = [title for title, row in attacked["checks"].items() if row["is_sign"]]
        checked = any(row["images"] for row in attacked["checks"].values())
        found = f"a sign by {' and '.join(signs)}: see the report" if signs else "no sign"
        rows["gradient masking"] = found if checked else "not checked, because no image withstands the attack"
    if humans := evaluation.cifar10h:
        cross_entropy, bound = humans["cross_entropy"], humans["entropy"]
        rows["CIFAR-10H"] = f"cross-entropy against human labels {cross_entropy:.4f}  (lower bound {bound:.4f})"
    return rows


def _accuracy(part: Summary) -> str:
    accuracy, low, high = (percent(value, part["images"]) for value in (part["accuracy"], *part["interval"]))
    return f"{accuracy}  (95% interval {low} to {high}, {part['images']:,} images)"


def confused(confusion: Sequence[Sequence[int]], most: int = 10) -> list[tuple[int, int, int]]:
    """Return the most frequent mistakes: the number of images, their class and the predicted class."""
    cells = [(count, label, guess) for label, row in enumerate(confusion) for guess, count in enumerate(row)]
    return sorted((cell for cell in cells if cell[0] and cell[1] != cell[2]), key=lambda cell: -cell[0])[:most]


def render(evaluation: Evaluation, figures: Mapping[str, Path], name: str | None = None) -> str:
    """Return the report as an HTML page that includes all figures.

    Args:
        figures: the paths of PNG files, by name.
        name: the name of the run; None: the path of the checkpoint.
    """
    template = templates().get_template("report.html.jinja")
    inlined = {name: base64.b64encode(path.read_bytes()).decode() for name, path in figures.items()}
    return template.render(
        record=evaluation,
        name=name or evaluation.checkpoint,
        rows=summary(evaluation),
        figures=inlined,
        left_out=CIFAR10_C_EXTRA,
        confused=confused(evaluation.confusion) if len(evaluation.classes) > MANY else None,
        percent=percent,
        members=members.table(evaluation.members, evaluation.test) if evaluation.members else None,
    )


def templates(*folders: Path) -> Environment:
    """Return jinja's environment of the HTML templates in these folders, and in the folder of the evaluation."""
    # names in a checkpoint may come from a stranger, so all values are escaped
    loader = FileSystemLoader([*folders, Path(__file__).with_name("templates")])
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)
