"""Rank the training images of runs by how suspicious their labels are, and find near-duplicates of the test images.

The runs were trained with callbacks=dynamics. With the runs of all folds, the suspicious labels are those that
confident learning finds (pip install 'cifarnet[audit]').

examples:
  python -m cifarnet.audit lightning_logs/baseline/<date_time>
  python -m cifarnet.audit lightning_logs/baseline/multirun_<date_time>     several seeds, or all folds
  python -m cifarnet.audit <run> count=500 data.root=pictures               a run on your own pictures
"""

import os
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.errors import UserError, printable
from cifarnet.inference.settings import prepare, without_data
from cifarnet.system import files, hardware

if TYPE_CHECKING:  # imports Lightning, which takes seconds
    from cifarnet.auditing.scores import Scored

LAST = "checkpoints/last.ckpt"  # the best checkpoint of a fold was chosen by the images that it classifies


def audit(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> "Scored":
    """Audit the training images of some runs, and write `audit.html`, `audit.csv`, `keep.txt` and `labels.txt`.

    Args:
        paths: the folders of runs, or of sweeps.
        overrides: overrides of `configs/audit.yaml`, such as "count=500".

    Returns:
        The scores of the images.

    Raises:
        UserError: a run, a setting or the data cannot be used; the message says what to do.
    """
    # imported here, because they take seconds and `--help` does not need them
    from cifarnet.auditing import networks, report, scores
    from cifarnet.build import make_data
    from cifarnet.inference import test_images
    from cifarnet.inference.trained import load
    from cifarnet.records.tables import row_table

    settings = prepare("audit", without_data(overrides))
    runs = scores.read(paths)
    scored, folders = scores.combine(list(runs.values())), list(runs)
    classifiers = [load(folder / LAST, locate(settings.classes)) for folder in folders]
    checkpoint = classifiers[0].checkpoint
    config = test_images.compose("audit", overrides, checkpoint, settings.classes)
    data = make_data(config)
    data.val_fraction, data.folds = 0, None  # all training images, in the order of the data set
    if data.changes_training:
        raise UserError("An audit needs all training images. Remove the settings of data that select images or labels.")
    checkpoint.check_task(data.class_names, data.image_size)
    train, test = data.source.train, data.source.test
    if (last := int(scored.index[-1])) >= len(train):
        problem = f"{folders[0]} was trained on image {last:,}, but the data has {len(train):,} training images"
        raise UserError(f"{problem}. Choose the data of the run, such as data.root=…")
    folder = Path(config.output_dir or Path(paths[0]) / "audit")
    files.refuse_links(folder.parent, [folder])
    files.make_folder(folder, f"output_dir={folder} cannot be created")
    counts = f"{len(scored.index):,} training images, {len(runs)} run{'s' * (len(runs) > 1)}"
    print(printable(f"{data.source_name}: {counts}"), flush=True)
    predict = {"tta": "none", "precision": config.precision, "accelerator": config.accelerator}
    predictors = (classifier.predictor(**predict) for classifier in classifiers)
    networks.confident_learning(scored, list(runs.values()), predictors, train)
    scored.count = scored.count if config.count is None else config.count
    pairs = []
    if config.duplicates:
        pairs = networks.near_duplicates(classifiers[0].predictor(**predict), train, test, config.duplicates)
    command = shlex.join(["python", "-m", "cifarnet.audit", *map(str, paths), *overrides])
    about = {"name": data.source_name, "runs": runs, "command": command, "versions": hardware.versions()}
    about["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = report.write(folder, scored, data.source, pairs, **about)
    print(printable(row_table(rows | {"report": os.path.relpath(folder / "audit.html")})))
    return scored


def main() -> None:
    """Run `python -m cifarnet.audit`."""
    cli.run(lambda: audit(*cli.parse("audit", __doc__)[:2]))


if __name__ == "__main__":
    main()
