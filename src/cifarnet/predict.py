"""Predict the class of each picture. Pictures can have any size and any format that Pillow reads.

The first path is a run's folder, a checkpoint file or the name of a trained network; the others are pictures. In place
of pictures, data=… chooses the test images of a data set; their true classes and losses are listed, too. The exit
status is 0, or 1 after an error, for example if a picture cannot be read.

examples:
  python -m cifarnet.predict speedrun cat.jpg
  python -m cifarnet.predict lightning_logs/baseline/<date_time> cat.jpg 'my holiday.png' pictures
  python -m cifarnet.predict <run> pictures top=1 tta=mirror output=predictions.csv
  python -m cifarnet.predict <run> cat.jpg explain=true                  draw a Grad-CAM map of each picture
  python -m cifarnet.predict <run> pictures temperature=evaluation     calibrate the probabilities
  python -m cifarnet.predict <run> pictures conformal=0.1              list the classes that cannot be excluded
  python -m cifarnet.predict <run> data=test output=test.csv           the test images of the run
"""

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
from cifarnet.errors import UserError, on_one_line, printable
from cifarnet.inference.settings import prepare, without_data
from cifarnet.system import files

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from cifarnet.inference.trained import Answer, Trained

NUM_DRAWN = 10  # the largest number of classes beside a Grad-CAM map
WIDTH = 60  # the largest width of the column of names, in characters
TITLE = 70  # the largest number of characters of a path above a figure


def predict(run: str | Path, images: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Predict the classes of pictures, or of the test images of a data set, and print them or write them to a file.

    Args:
        run: a run's folder, a checkpoint file or the name of a trained network.
        images: paths of image files, and of folders of image files; none if an override chooses a data set.
        overrides: overrides of `configs/predict.yaml`, such as "top=1" or "data=test".

    Raises:
        UserError: the checkpoint or a setting cannot be used, or, after all other pictures were processed, some
            pictures cannot be read.
    """
    others = without_data(overrides)
    config, data = prepare("predict", others), [override for override in overrides if override not in others]
    unused = images or [override for override in others if cli.key_of(override) in ("top", "explain", "conformal")]
    if data and unused:
        raise UserError(f"{unused[0]} cannot be combined with {data[0]}. Remove one of them.")
    output = None if config.output is None else Path(config.output)
    if output is not None:
        if output.suffix.lower() not in (".csv", ".json"):
            raise UserError(f"output={output}: use a file name that ends with .csv or .json.")
        files.check_output(output)
        files.make_folder(output.parent, f"output={output} cannot be written")
    # imported here, because it takes seconds and `--help` does not need it
    from cifarnet.inference.trained import load

    classifier = load(run, locate(config.classes))
    config.temperature = classifier.temperature(config.temperature, config.tta)
    rows = _test_images(classifier, overrides, config) if data else _pictures(classifier, images, config)
    if output is not None:
        checkpoint = classifier.checkpoint
        circumstances = {"checkpoint": str(checkpoint.path), "epoch": checkpoint.epoch, **classifier.tested}
        chosen = ("tta", "precision", "temperature", "conformal")
        circumstances |= {key: config[key] for key in chosen if config[key]} | ({"data": data} if data else {})
        _write(circumstances | {"predictions": rows}, output)
        print(printable(f"{output}: {len(rows):,} row{'s' * (len(rows) != 1)}"))
    if unread := sum(row.get("error") is not None for row in rows):
        raise UserError(f"{unread:,} of {len(rows):,} pictures could not be read; the reasons are above.")


def _test_images(classifier: "Trained", overrides: Sequence[str], config: "DictConfig") -> list[dict[str, Any]]:
    """Return the predictions for the test images of the run, or of the data set that the overrides choose."""
    from cifarnet.evaluation.predictions import per_image
    from cifarnet.inference import ensemble, test_images

    chosen = [override for override in overrides if override != "data=test"]
    data = test_images.load("predict", chosen, classifier.checkpoint, config.classes)
    predictor = ensemble.make_predictor([classifier], config)
    rows = per_image(predictor.predict_all(data.test_dataloader(), "test"), data, config.temperature)
    if config.output is None:
        print(printable(_table(rows).replace("\r\n", "\n")), end="")
    return rows


def _pictures(classifier: "Trained", images: Sequence[str], config: "DictConfig") -> list[dict[str, Any]]:
    """Return the predictions for pictures, with an error message for each picture that cannot be read."""
    names = ("tta", "batch_size", "workers", "precision", "accelerator", "temperature")
    settings = {name: config[name] for name in names}
    threshold = config.conformal and classifier.conformal_threshold(config.conformal, config.tta)
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
            sets = {"conformal_set": classifier.conformal_set(answer.logits, threshold)} if config.conformal else {}
            rows.append({"file": str(answer.source), "top": top, **sets, "error": answer.error or None})
            if answer.error:
                tqdm.write(on_one_line(answer.error), file=sys.stderr)
            elif config.output is None:
                cells = [f"{row['class']} {row['probability']:.2%}" for row in top]
                cells += [f"{{{', '.join(classes)}}}" for classes in sets.values()]
                tqdm.write(on_one_line("  ".join([f"{on_one_line(str(answer.source)):<{width}}", *cells])))
            if drawings is not None and not answer.error:
                _draw(classifier, answer, drawings)
    if drawings is not None:
        print(f"Grad-CAM maps: {on_one_line(os.path.relpath(drawings))}")
    return rows


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
        raise UserError("There are no images to predict. Specify image files, folders of them, or data=test.")
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
    is_json = output.suffix.lower() == ".json"
    text = json.dumps(content, indent=1) if is_json else _table(content["predictions"])
    try:
        files.write(output, text.encode("utf-8", "surrogateescape"))  # file names can contain any bytes
    except OSError as error:
        raise UserError(f"output={output} cannot be written ({error.strerror}). Choose another path.") from error


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, with a column for each of the most probable classes and for their probabilities."""
    from cifarnet.records.tables import csv_text

    def cells(key: str, value: Any) -> dict[str, Any]:
        if key == "top":
            return {f"{name}_{rank}": cell for rank, row in enumerate(value, 1) for name, cell in row.items()}
        return {key: "; ".join(value) if isinstance(value, list) else value}

    table = [dict(cell for item in row.items() for cell in cells(*item).items()) for row in rows]
    return csv_text(table, max(table, key=len))  # a picture that cannot be read has no classes


def _command() -> None:
    (run, *images), overrides, _ = cli.parse("predict", __doc__)
    predict(run, images, overrides)


def main() -> None:
    """Run `python -m cifarnet.predict`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
