"""The results of an audit: files with scores, labels and positions, and an HTML page that works offline."""

import base64
import io
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
from cifarnet.records.tables import csv_text
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
    names, ranked = np.array(source.class_names), scored.ranked
    columns = {"file": np.array(source.files["train"], object)[scored.index]} if source.files else {}
    columns |= {"position": scored.index, "given": names[scored.given], "suggested": names[scored.suggested]}
    columns |= {name: score.round(6) for name, score in scored.values.items()}
    ordered = zip(*(column[ranked].tolist() for column in columns.values()), strict=True)
    rows = [dict(zip(columns, row, strict=True)) for row in ordered]
    files.write(folder / "audit.csv", csv_text(rows, columns).encode(errors="surrogateescape"))
    chosen, labels = ranked[: scored.count], source.train.labels.numpy().copy()
    labels[scored.index] = scored.given
    labels[scored.index[chosen]] = scored.suggested[chosen]
    for name, numbers in {"keep": np.delete(scored.index, chosen), "labels": labels}.items():
        files.write(folder / f"{name}.txt", "".join(f"{number}\n" for number in numbers))
    results = {"most suspicious labels": f"{scored.count:,} of {len(scored.index):,}  (by {scored.order})"}
    if scored.agreement is not None:
        results["out-of-fold accuracy"] = f"{scored.agreement:.2%}  (if it is low, too many labels are suspicious)"
    if pairs:
        results["most similar images"] = f"{len(pairs):,} pairs, similarity {pairs[0][0]:.4f} to {pairs[-1][0]:.4f}"
    template = report.templates(Path(__file__).with_name("templates")).get_template("audit.html.jinja")
    html = template.render(
        scored=scored, source=source, pairs=pairs, rows=results, thumbnail=thumbnail, folder=folder, **about
    )
    files.write(folder / "audit.html", html)
    return results


def thumbnail(image: Tensor) -> str:
    """Return an image, uint8 [3, H, W], as a base64-encoded PNG file."""
    picture, content = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(content, "png")
    return base64.b64encode(content.getvalue()).decode()
