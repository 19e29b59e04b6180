"""What a trained network takes pictures for: files of any size and kind that Pillow reads, and folders of them.

The first path is a run's folder or a checkpoint file, the others are pictures. Exit status: 0; 1 if one cannot be read.
"""

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig
from tqdm import tqdm

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.config import check_own
from cifarnet.errors import UserError, printable
from cifarnet.schema import Range
from cifarnet.system import files, hardware

if TYPE_CHECKING:
    from cifarnet.inference.trained import Answer, Trained

EXAMPLES = """\
  python -m cifarnet.predict lightning_logs/baseline/<date_time> cat.jpg 'my holiday.png' pictures
  python -m cifarnet.predict <run> pictures top=1 tta=mirror output=predictions.csv
  python -m cifarnet.predict <run> cat.jpg explain=true                  a picture of where the network looked
  python -m cifarnet.predict <run> pictures temperature=evaluation     as sure as it was right in validation
"""
TYPES = dict.fromkeys(("tta", "output"), str | None) | dict.fromkeys(("top", "workers"), int | None)
TYPES |= {"temperature": float | str | None, "batch_size": int, "precision": str | int | None}
TYPES |= {"accelerator": str, "classes": list[str], "explain": bool}
RANGES = {"top": Annotated[int, Range(1)], "workers": Annotated[int, Range(1, 512)]}
RANGES |= {"batch_size": Annotated[int, Range(1, 1_000_000)]}
ENDINGS = (".csv", ".json")
SHOWN = 10  # classes beside a picture, at most
WIDTH = 60  # of the column of names, at most
TITLE = 70  # characters of a path above its picture, at most


def predict(run: str | Path, images: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Print, or write to a file, what a run's network takes images for.

    Args:
        run: its folder or a checkpoint file.
        images: files, and folders of them.
        overrides: of `configs/predict.yaml`, such as "top=1".

    Raises:
        UserError: the checkpoint or a setting cannot be used; or, after all others were looked at, some or all images
            cannot be read.
    """
    config = configure(overrides)
    from cifarnet.inference import trained  # these take seconds: a wrong setting is told before
    from cifarnet.system.log_output import quiet_libraries

    quiet_libraries()
    hardware.keep_freed_memory()
    try:
        classifier = trained.load(run, locate(config.classes))
    except UserError as error:
        if runs := [path for path in images if Path(path, "checkpoints").is_dir()]:
            raise UserError(f"{error} If {runs[0]} is the run, name it first, and pictures after it.") from error
        raise
    temperature = classifier.temperature(config.temperature, config.tta)
    sources, rows = listed(images)
    folder, taken = explanations(classifier.path) if config.explain else None, Counter()
    asked = {key: config[key] for key in ("tta", "batch_size", "workers", "precision", "accelerator")}
    width = min(WIDTH, max((len(shown(source)) for source in sources), default=0))
    with tqdm(total=len(sources), desc="Predicting", unit=" images", leave=False, disable=None) as bar:
        for answer in classifier.answers(sources, **asked):
            bar.update()
            ranked = [] if answer.logits is None else classifier.ranked(answer.logits, temperature)[: config.top]
            rows.append({"file": answer.source, "top": ranked, "error": answer.error or None})
            if answer.error:
                tell(answer.error)
                continue
            if folder is not None:
                explain(classifier, answer, classifier.ranked(answer.logits, temperature)[:SHOWN], folder, taken)
            if config.output is None:
                shares = "  ".join(f"{shown(name)} {share:.2%}" for name, share in ranked)
                tqdm.write(f"{shown(answer.source):<{width}}  {shares}")
    if folder is not None:
        print(f"Where the network looked: {shown(os.path.relpath(folder))}")
    if config.output is not None:
        circumstances = {"checkpoint": str(classifier.path), "epoch": classifier.epoch, **classifier.tested}
        circumstances |= {key: asked[key] for key in ("tta", "precision") if asked[key] is not None}
        save_rows(rows, Path(config.output), circumstances | {"temperature": temperature})
    unread = sum(row["error"] is not None for row in rows)
    if unread:
        raise UserError(f"{unread:,} of {len(rows):,} could not be read; what is wrong with each is told above.")


def configure(overrides: Sequence[str]) -> DictConfig:
    """`configs/predict.yaml`, checked."""
    config = cli.compose("predict", overrides)
    check_own(config, TYPES, RANGES)
    if config.output is not None:
        output = Path(config.output)
        if output.suffix.lower() not in ENDINGS or output.is_dir():
            raise UserError(f"output={output}: name a file that ends with .csv or .json.")
        files.make_folder(output.parent, f"output={output} cannot be written")
    return config


def listed(images: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The files, and those in and below the folders; and rows of the result for folders that cannot be read.

    Raises:
        UserError: there is none.
    """
    from cifarnet.data.pixels import image_files

    sources, rows, empty = [], [], []

    def unreadable(error: OSError) -> None:
        rows.append(
            {"file": error.filename, "top": [], "error": f"{error.filename} cannot be read ({error.strerror})."}
        )

    for path in images:
        before = len(sources), len(rows)
        sources += image_files(path, unreadable) if os.path.isdir(path) else [path]
        if (len(sources), len(rows)) == before:
            empty.append(path)
    if not sources and not rows:
        raise UserError(f"There are no images (.png, .jpg, .gif, .tif, .webp, …) in {', '.join(map(shown, empty))}.")
    for line in [f"There are no images in {path}." for path in empty] + [row["error"] for row in rows]:
        tell(line)
    return sources, rows


def explanations(checkpoint: Path) -> Path:
    """A new folder for pictures of where the network looked."""
    from cifarnet.inference.trained import folder_for

    folder = folder_for(checkpoint, "explained") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    files.refuse_links(folder.parent.parent, [folder.parent])
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"explain=true: {folder} cannot be made ({error.strerror}).") from error
    return folder


def explain(
    classifier: "Trained", answer: "Answer", ranked: Sequence[tuple[str, float]], folder: Path, taken: Counter[str]
) -> None:
    """Write a PNG beside the others, under the picture's name, which `taken` counts."""
    from cifarnet.inference import figures
    from cifarnet.records.figures import save

    stem = os.fsencode(Path(str(answer.source)).stem)[:150].decode(errors="ignore")
    taken[stem] += 1
    path = folder / (f"{stem}.png" if taken[stem] == 1 else f"{stem}_{taken[stem]}.png")
    heat, source = classifier.heat(answer.pixels, answer.logits), shown(str(answer.source))
    title = source if len(source) <= TITLE else f"…{source[-TITLE:]}"
    save(figures.explained(answer.pixels, heat, ranked, title), path)


def shown(text: str) -> str:
    """A name on one line, without what commands a terminal."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def tell(error: str) -> None:
    """That something cannot be read, on one line beside the progress bar."""
    tqdm.write(shown(error), file=sys.stderr)


def save_rows(rows: Sequence[dict[str, Any]], output: Path, circumstances: dict[str, Any]) -> None:
    """A row an image as CSV; as JSON with what the answers depend on too."""
    if output.suffix.lower() == ".json":
        named = [row | {"top": [{"class": name, "probability": share} for name, share in row["top"]]} for row in rows]
        content = json.dumps(circumstances | {"predictions": named}, indent=1).encode()
    else:
        most = max(len(row["top"]) for row in rows)
        table = io.StringIO()
        writer = csv.writer(table)
        heads = [f"{head}_{place}" for place in range(1, most + 1) for head in ("class", "probability")]
        writer.writerow(["file", *heads, "error"])
        for row in rows:
            cells = [cell for ranked in row["top"] for cell in ranked]
            writer.writerow([row["file"], *cells, *[""] * (2 * most - len(cells)), row["error"]])
        content = table.getvalue().encode("utf-8", "surrogateescape")  # names of files may be any bytes
    try:
        files.write(output, content)
    except OSError as error:
        raise UserError(f"output={output} cannot be written ({error.strerror}).") from error
    print(printable(f"{output}: {len(rows):,} row{'s' * (len(rows) != 1)}"))


def _command() -> None:
    paths, overrides, _ = cli.parse("predict", __doc__, EXAMPLES)
    if len(paths) == 1:
        raise UserError("Name pictures too: python -m cifarnet.predict <run> <files and folders>")
    predict(paths[0], paths[1:], overrides)


def main() -> None:
    """The command `python -m cifarnet.predict`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
