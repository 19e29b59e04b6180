"""The results of an audit: files with scores, labels and positions, and an HTML page that works offline."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cifarnet.auditing.networks import Pair
from cifarnet.auditing.scores import Scored
from cifarnet.data import Source
from cifarnet.evaluation import report
from cifarnet.evaluation.metrics import proportion
from cifarnet.records.tables import csv_text, percent
from cifarnet.system import files

SIDE = 64  # the largest height and width of an image on the page, in pixels


def write(folder: Path, scored: Scored, source: Source, pairs: Sequence[Pair], **about: Any) -> dict[str, str]:
    """Write `audit.csv` and `audit.html`, and `keep.txt` and `labels.txt` for `data.keep` and `data.labels`.

    Args:
        source: all training images of the data set, and its test images.
        pairs: as returned by `networks.near_duplicates`.
        about: the circumstances of the audit.

    Returns:
        The main results by name.
    """
    names, ranked, table = source.class_names, scored.ranked, []
    for rank, row in enumerate(ranked.tolist(), 1):
        given, suggested = names[scored.given[row]], names[scored.suggested[row]]
        cells = {"rank": rank, "position": scored.index[row], "given": given, "suggested": suggested}
        table.append(cells | {name: f"{score[row]:.6g}" for name, score in scored.values.items()})
    files.write(folder / "audit.csv", csv_text(table, table[0]))
    chosen, labels = ranked[: scored.count], source.train.labels.numpy().copy()
    labels[scored.index] = scored.given
    labels[scored.index[chosen]] = scored.suggested[chosen]
    for name, numbers in {"keep": np.delete(scored.index, chosen), "labels": labels}.items():
        files.write(folder / f"{name}.txt", "".join(f"{number}\n" for number in numbers))
    changes = Counter(f"{names[scored.given[row]]} → {names[scored.suggested[row]]}" for row in chosen)
    share = f"{scored.count / len(scored.index):.2%}, by {scored.order}"
    rows = {"suspicious labels": f"{scored.count:,} of {len(scored.index):,}  ({share})"}
    rows["most frequent"] = ", ".join(f"{change} {count:,}" for change, count in changes.most_common(5)) or "none"
    if pairs:
        rows["near-duplicates"] = f"{len(pairs):,} test images, similarity {pairs[0][0]:.4f} to {pairs[-1][0]:.4f}"
    template = report.templates(Path(__file__).with_name("templates")).get_template("audit.html.jinja")
    about |= {"thumbnail": thumbnail, "proportion": proportion, "percent": percent}
    html = template.render(scored=scored, source=source, pairs=pairs, rows=rows, **about)
    files.write(folder / "audit.html", html)
    return rows


def thumbnail(image: Tensor) -> str:
    """Return an image, uint8 [3, H, W], as a base64-encoded PNG file."""
    picture, content = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(content, "png")
    return base64.b64encode(content.getvalue()).decode()
