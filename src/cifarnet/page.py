"""An evaluation's figures for people: rows for the terminal, and `report.html`, one file that opens offline."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape  # names in a checkpoint may come from a stranger
from typing import Any

from cifarnet.metrics import DEFINITION
from cifarnet.robustness import CIFAR10_C_EXTRA

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #59636e; --line: #d1d9e0; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --faint: #9198a1; --line: #3d444d; --page: #0d1117; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--page); }
header { margin-bottom: 1rem; }
header p { margin: 0; color: var(--faint); }
h1 { margin: 0; font-size: clamp(2.6rem, 12vw, 4.5rem); line-height: 1.1; font-weight: 650; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
p { margin: .5rem 0; max-width: 46rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--faint); white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 6ch; }
figure { margin: 1rem 0; overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
img { display: block; max-width: 100%; min-width: min(34rem, 150vw); height: auto; margin: 0 auto; }
"""


def heading(metrics: Mapping[str, Any]) -> str:
    """What is about to be measured, for the terminal."""
    data = metrics["data"]
    return (
        f"{metrics['network']} after epoch {metrics['epoch']}, on {data['source']}: {data['val']:,} / {data['test']:,} "
        f"images to validate / test\ntta={metrics['tta']}, {metrics['precision']} on {metrics['hardware']['device']}"
    )


def rows(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What people look for first, name -> figures."""
    test, val, scaled = metrics["test"], metrics["val"], metrics["test_with_temperature"]
    shown = {"test accuracy": _share(test)}
    if metrics["tta"] != "none":
        shown["without augmentation"] = f"{metrics['test_accuracy_one_view']:.2%}  (test-time, tta={metrics['tta']})"
    shown["validation accuracy"] = _share(val) if val else "none  (trained on all images)"
    shown["top-2 accuracy"] = f"{test['top2_accuracy']:.2%}"
    for name, key, form in [
        ("calibration error", "calibration_error", ".2%"),
        ("cross-entropy", "cross_entropy", ".4f"),
        ("Brier score", "brier", ".4f"),
    ]:
        shown[name] = format(test[key], form)
        if scaled:
            shown[name] += f"  ({scaled[key]:{form}} with temperature {metrics['temperature']:.3f})"
    hardest = sorted((row for row in metrics["classes"] if row["images"]), key=lambda row: row["accuracy"])[:3]
    shown["hardest classes"] = ", ".join(f"{row['name']} {row['accuracy']:.1%}" for row in hardest)
    if corruptions := metrics["corruptions"]:
        shown["under corruption"] = f"{corruptions['mean']:.2%}  (mean; not to be compared with CIFAR-10-C)"
    if published := metrics["cifar10_c"]:
        shown["CIFAR-10-C"] = f"{published['mean']:.2%}  (mean of {len(published['averaged'])} corruptions)"
    shown |= {f"CIFAR-10.1 {version}": _share(figures) for version, figures in (metrics["cifar10_1"] or {}).items()}
    if people := metrics["cifar10h"]:
        least = f"(the least possible: {people['entropy']:.4f})"
        shown["CIFAR-10H"] = f"cross-entropy against people's labels {people['cross_entropy']:.4f}  {least}"
    return shown


def _share(figures: Mapping[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = figures["interval"]
    return f"{figures['accuracy']:.2%}  (95% interval {low:.2%} to {high:.2%}, {figures['images']:,} images)"


def render(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page: HTML with everything in it. `pictures`, by name, are PNG files."""
    low, high = metrics["test"]["interval"]
    data = metrics["data"]
    parts = [
        f"<header><p>{escape(metrics['network'])}, {metrics['parameters']:,} parameters, after epoch "
        f"{metrics['epoch']}; {escape(data['source'])}</p><h1>{metrics['test']['accuracy']:.2%}</h1>"
        f"<p>test accuracy on {data['test']:,} images; 95% interval {low:.2%} to {high:.2%} (Wilson)</p></header>",
        _table([], rows(metrics).items()),
        *_section("Confusion matrix", pictures, "confusion"),
        *_section("The most confident mistakes", pictures, "mistakes"),
        *_section("Reliability", pictures, "reliability", f"{DEFINITION} {_temperature(metrics)}"),
    ]
    if metrics["corruptions"]:
        text = (
            "Test images corrupted on the fly, by this project's own corruptions and levels: the figures are not to be "
            "compared with those on CIFAR-10-C."
        )
        parts += _section("Robustness", pictures, "corruptions", text)
        parts += _section("", pictures, "corruption_examples", "The first test image; levels are in metrics.json.")
    if published := metrics["cifar10_c"]:
        text = f"Mean of {len(published['averaged'])} corruptions, without {', '.join(CIFAR10_C_EXTRA)}, as published."
        parts += _section("CIFAR-10-C", pictures, "cifar10_c", text)
    classes = ((row["name"], f"{row['images']:,}", *_cells(row)) for row in metrics["classes"])
    parts += ["<h2>Accuracy by class</h2>", _table(["class", "images", "accuracy", "95% interval"], classes)]
    parts += ["<h2>Circumstances</h2>", _table([], _circumstances(metrics))]
    title = escape(f"{metrics['test']['accuracy']:.2%}: {metrics['checkpoint']}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _section(title: str, pictures: Mapping[str, bytes], name: str, text: str = "") -> list[str]:
    """A heading, a text and a picture, or nothing where there is no such picture."""
    if name not in pictures:
        return []
    inline = base64.b64encode(pictures[name]).decode()
    return [
        f"<h2>{escape(title)}</h2>" if title else "",
        f"<p>{escape(text)}</p>" if text else "",
        f'<figure><img alt="{escape(title or name)}" src="data:image/png;base64,{inline}"></figure>',
    ]


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """The first cell of a row is its name."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"] if head else []
    for name, *cells in body:
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _cells(row: Mapping[str, Any]) -> tuple[str, str]:
    if math.isnan(row["accuracy"]):
        return "", ""
    low, high = row["interval"]
    return f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"


def _temperature(metrics: Mapping[str, Any]) -> str:
    if metrics["temperature"] is None:
        return "The run trained on all images: none are left to fit a temperature on."
    return (
        f"The temperature, {metrics['temperature']:.3f}, divides the logits; it minimises the cross-entropy of "
        f"{metrics['val']['images']:,} validation images (Guo et al., 2017)."
    )


def _circumstances(metrics: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    data, hardware = metrics["data"], metrics["hardware"]
    yield "checkpoint", metrics["checkpoint"]
    yield "command", metrics["command"]
    counts = " / ".join(f"{data[split]:,}" for split in ("train", "val", "test"))
    yield "data", f"{data['source']}: {counts} images to train / validate / test; sha256 {data['sha256']}"
    yield "precision", f"{metrics['precision']}, tta={metrics['tta']} tta_share={metrics['tta_share']:g}"
    yield "hardware", f"{hardware['device']}: {hardware['name']}, {hardware['threads']} threads, {hardware['system']}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    yield "date", metrics["finished"]
