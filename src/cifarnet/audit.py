"""Rank the training images of runs by how suspicious their labels are, and find near-duplicates of the test images.

The runs were trained with callbacks=dynamics. With the runs of all folds, the images are ranked by the probabilities of
networks that were trained without them, and confident learning estimates the number of wrong labels
(pip install 'cifarnet[audit]').

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
    from cifarnet.inference import test_images
    from cifarnet.inference.trained import load
    from cifarnet.records.tables import row_table

    settings = prepare("audit", without_data(overrides))
    runs = scores.read(paths)
    scored = scores.combine(list(runs.values()))
    # a large sweep keeps only the checkpoints of its best runs
    kept = {folder: run for folder, run in runs.items() if (folder / LAST).exists()} or runs
    classifiers = [load(folder / LAST, locate(settings.classes)) for folder in kept]
    checkpoint, record, run = classifiers[0].checkpoint, classifiers[0].run_record(), next(iter(kept.values()))
    # all training images, in the order of the data set
    chosen = [*overrides, "++data.val_fraction=0", "++data.folds=null", "++data.fold=null"]
    data = test_images.load("audit", chosen, checkpoint, settings.classes)
    true = data.source.train.labels.numpy()
    most = record.data.get("wrong_labels", 0) if record else len(true)
    if data.changes_training or scored.index[-1] >= len(true) or (true[run["index"]] != run["labels"]).sum() > most:
        problem = f"The data lacks images that {checkpoint.path} was trained on, or its labels differ"
        raise UserError(f"{problem}. Use the run's data (data.root=…) without settings that select images or labels.")
    several = f"lightning_logs/audit/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    folder = Path(settings.output_dir or (several if len(paths) > 1 else Path(paths[0]) / "audit"))
    files.refuse_links(folder.parent, [folder])
    files.make_folder(folder, f"output_dir={folder} cannot be created")
    predict = {"tta": "none", "precision": settings.precision, "accelerator": settings.accelerator}
    predictors = [classifier.predictor(**predict) for classifier in classifiers]
    networks.confident_learning(scored, list(kept.values()), predictors, data)
    scored.count = min(scored.count if settings.count is None else settings.count, len(scored.index))
    pairs = networks.near_duplicates(predictors[0], data, settings.duplicates) if settings.duplicates else []
    about = {"runs": runs, "versions": hardware.versions(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"}
    about["command"] = shlex.join(["python", "-m", "cifarnet.audit", *map(str, paths), *overrides])
    rows = report.write(folder, scored, data.source, pairs, name=data.source_name, **about)
    written = {"labels": "labels.txt", "report": "audit.html"}
    print(printable(row_table(rows | {name: os.path.relpath(folder / file) for name, file in written.items()})))
    return scored


def main() -> None:
    """Run `python -m cifarnet.audit`."""
    cli.run(lambda: audit(*cli.parse("audit", __doc__)[:2]))


if __name__ == "__main__":
    main()
