"""Predict the class of each picture. Pictures can have any size and any format that Pillow reads.

The first path is a run's folder, a checkpoint file or the name of a trained network; the others are pictures. The exit
status is 0, or 1 after an error, for example if a picture cannot be read.

examples:
  python -m cifarnet.predict speedrun cat.jpg
  python -m cifarnet.predict lightning_logs/baseline/<date_time> cat.jpg 'my holiday.png' pictures
  python -m cifarnet.predict <run> pictures top=1 tta=mirror output=predictions.csv
  python -m cifarnet.predict <run> cat.jpg explain=true                  draw a Grad-CAM map of each picture
  python -m cifarnet.predict <run> pictures temperature=evaluation     calibrate the probabilities
"""

import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.errors import UserError, csv_cell, on_one_line, printable
from cifarnet.inference.settings import prepare
from cifarnet.system import files

if TYPE_CHECKING:
    from cifarnet.inference.trained import Answer, Trained

NUM_DRAWN = 10  # the largest number of classes beside a Grad-CAM map
WIDTH = 60  # the largest width of the column of names, in characters
TITLE = 70  # the largest number of characters of a path above a figure


def predict(run: str | Path, images: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Predict the classes of pictures, and print them or write them to a file.

    Args:
        run: a run's folder, a checkpoint file or the name of a trained network.
        images: paths of image files, and of folders of image files.
        overrides: overrides of `configs/predict.yaml`, such as "top=1".

    Raises:
        UserError: the checkpoint or a setting cannot be used, or, after all other pictures were processed, some
            pictures cannot be read.
    """
    config = prepare("predict", overrides)
    output = None if config.output is None else Path(config.output)
    if output is not None:
        if output.suffix.lower() not in (".csv", ".json"):
            raise UserError(f"output={output}: use a file name that ends with .csv or .json.")
        files.check_output(output)
        files.make_folder(output.parent, f"output={output} cannot be written")
    # imported here, because it takes seconds and `--help` does not need it
    from cifarnet.inference.trained import load

    classifier = load(run, locate(config.classes))
    settings = {key: config[key] for key in ("tta", "batch_size", "workers", "precision", "accelerator")}
    settings["temperature"] = classifier.temperature(config.temperature, config.tta)
    sources = _list_pictures(images)
    drawings = None
    if config.explain:
        drawings = classifier.checkpoint.folder_for("explained") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        files.make_folder(drawings, f"explain=true: {drawings} cannot be created")
    width = min(WIDTH, max(len(on_one_line(source)) for source in sources))
    rows = []
    with tqdm(total=len(sources), desc="Predicting", unit=" images", leave=False, disable=None) as bar:
        for answer in classifier.answers(sources, **settings):
            bar.update()
            top = [{"class": name, "probability": value} for name, value in answer.ranked[: config.top]]
            rows.append({"file": str(answer.source), "top": top, "error": answer.error or None})
            if answer.error:
                tqdm.write(on_one_line(answer.error), file=sys.stderr)
            elif output is None:
                cells = [f"{row['class']} {row['probability']:.2%}" for row in top]
                tqdm.write(on_one_line("  ".join([f"{on_one_line(str(answer.source)):<{width}}", *cells])))
            if drawings is not None and not answer.error:
                _draw(classifier, answer, drawings)
    if drawings is not None:
        print(f"Grad-CAM maps: {on_one_line(os.path.relpath(drawings))}")
    if output is not None:
        checkpoint = classifier.checkpoint
        circumstances = {"checkpoint": str(checkpoint.path), "epoch": checkpoint.epoch, **classifier.tested}
        circumstances |= {key: settings[key] for key in ("tta", "precision", "temperature") if settings[key]}
        _write(circumstances | {"predictions": rows}, output)
        print(printable(f"{output}: {len(rows):,} row{'s' * (len(rows) != 1)}"))
    if unread := sum(row["error"] is not None for row in rows):
        raise UserError(f"{unread:,} of {len(rows):,} pictures could not be read; the reasons are above.")


def _list_pictures(images: Sequence[str]) -> list[str]:
    """Return the paths of the image files, including those in and below the folders."""
    from cifarnet.data.decoding import expand_folders
    from cifarnet.data.pixels import describe_left_out

    pictures = []
    for path in images:
        left_out: list[str] = []
        found = [str(picture) for picture in expand_folders(path, left_out)]
        if left_out:
            print(on_one_line(f"{path}: {describe_left_out(left_out)}"), file=sys.stderr)
        if not found:
            print(on_one_line(f"There are no images (.png, .jpg, .gif, .tif, .webp, …) in {path}."), file=sys.stderr)
        pictures += found
    if not pictures:
        raise UserError("There are no images to predict. Specify image files, or folders of them.")
    return pictures


def _draw(classifier: "Trained", answer: "Answer", folder: Path) -> None:
    """Save a figure of the Grad-CAM map under the picture's name, with a number if the name already exists."""
    from cifarnet.inference.figures import explanation
    from cifarnet.records.figures import save

    source = on_one_line(str(answer.source))
    title = source if len(source) <= TITLE else f"…{source[-TITLE:]}"
    figure = explanation(answer.pixels, classifier.heat(answer), answer.ranked[:NUM_DRAWN], title)
    stem = os.fsencode(Path(str(answer.source)).stem)[:150].decode(errors="ignore")
    save(figure, files.unused(folder / f"{stem}.png"))


def _write(content: Mapping[str, Any], output: Path) -> None:
    """Write a JSON file with the predictions and their settings, or a CSV file with a row for each picture."""
    if output.suffix.lower() == ".json":
        text = json.dumps(content, indent=1)
    else:
        rows = []
        for row in content["predictions"]:
            ranked = enumerate(row["top"], 1)
            cells = {f"{key}_{rank}": cell for rank, entry in ranked for key, cell in entry.items()}
            rows.append({"file": row["file"], **cells, "error": row["error"]})
        table = io.StringIO()
        writer = csv.DictWriter(table, max(rows, key=len))  # a picture that cannot be read has no classes
        writer.writeheader()
        writer.writerows({key: csv_cell(cell) for key, cell in row.items()} for row in rows)
        text = table.getvalue()
    try:
        files.write(output, text.encode("utf-8", "surrogateescape"))  # file names can contain any bytes
    except OSError as error:
        raise UserError(f"output={output} cannot be written ({error.strerror}). Choose another path.") from error


def _command() -> None:
    paths, overrides, _ = cli.parse("predict", __doc__)
    if len(paths) == 1:
        raise UserError("No pictures given. Use: python -m cifarnet.predict <run> <files and folders>")
    predict(paths[0], paths[1:], overrides)


def main() -> None:
    """Run `python -m cifarnet.predict`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
