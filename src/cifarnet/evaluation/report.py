"""An evaluation's record for people: rows for the terminal, and the report, one HTML page that opens offline."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from cifarnet.evaluation.public_sets import CIFAR10_C_EXTRA


def heading(record: Mapping[str, Any]) -> str:
    """What is about to be measured, for the terminal."""
    data = record["data"]
    return (
        f"{record['network']} after epoch {record['epoch']}, on {data['source']}: {data['val']:,} / {data['test']:,} "
        f"images to validate / test\ntta={record['tta']}, {record['precision']} on {record['hardware']['device']}"
    )


def rows(record: Mapping[str, Any]) -> dict[str, str]:
    """What people look for first, name -> numbers."""
    test, val, scaled = record["test"], record["val"], record["test_with_temperature"]
    shown = {"test accuracy": _share(test)}
    if record["tta"] != "none":
        shown["without augmentation"] = f"{record['test_accuracy_one_view']:.2%}  (test-time, tta={record['tta']})"
    shown["validation accuracy"] = _share(val) if val else "none  (trained on all images)"
    shown["top-2 accuracy"] = f"{test['top2_accuracy']:.2%}"
    for name, key, form in [
        ("calibration error", "calibration_error", ".2%"),
        ("cross-entropy", "cross_entropy", ".4f"),
        ("Brier score", "brier", ".4f"),
    ]:
        shown[name] = format(test[key], form)
        if scaled:
            shown[name] += f"  ({scaled[key]:{form}} with temperature {record['temperature']:.3f})"
    hardest = sorted((row for row in record["classes"] if row["images"]), key=lambda row: row["accuracy"])[:3]
    shown["hardest classes"] = ", ".join(f"{row['name']} {row['accuracy']:.1%}" for row in hardest)
    if corruptions := record["corruptions"]:
        shown["under corruption"] = f"{corruptions['mean']:.2%}  (mean; not to be compared with CIFAR-10-C)"
    if published := record["cifar10_c"]:
        shown["CIFAR-10-C"] = f"{published['mean']:.2%}  (mean of {len(published['averaged'])} corruptions)"
    shown |= {f"CIFAR-10.1 {version}": _share(part) for version, part in (record["cifar10_1"] or {}).items()}
    if people := record["cifar10h"]:
        least = f"(the least possible: {people['entropy']:.4f})"
        shown["CIFAR-10H"] = f"cross-entropy against people's labels {people['cross_entropy']:.4f}  {least}"
    return shown


def _share(part: Mapping[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = part["interval"]
    return f"{part['accuracy']:.2%}  (95% interval {low:.2%} to {high:.2%}, {part['images']:,} images)"


def render(record: Mapping[str, Any], figures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The page: HTML with everything in it. `figures`, by name, are PNG files, for light and for dark mode."""
    text = Path(__file__).with_name("report.html.jinja").read_text("utf-8")
    spacing = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    # escaped, because names in a checkpoint may come from a stranger
    template = Template(text, autoescape=True, undefined=StrictUndefined, **spacing)
    inlined = {name: [base64.b64encode(png).decode() for png in pngs] for name, pngs in figures.items()}
    return template.render(record=record, rows=rows(record), figures=inlined, left_out=CIFAR10_C_EXTRA)
