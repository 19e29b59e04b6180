"""Evaluate a trained network: write an HTML report on its accuracy, calibration, mistakes and robustness.

Several runs, or the runs in the folder of a sweep, are evaluated as an ensemble, which averages their probabilities.

examples:
  python -m cifarnet.evaluate speedrun data=cifar10                    a trained network of this package
  python -m cifarnet.evaluate lightning_logs/baseline/<date_time>
  python -m cifarnet.evaluate <run> tta=mirror corruptions=false
  python -m cifarnet.evaluate <run> <run> soup=true                    their ensemble, and the mean of their weights
  python -m cifarnet.evaluate <run> data=folder data.root=pictures     other images of the same classes
  python -m cifarnet.evaluate <run> attack=pgd                         adversarial accuracy
  python -m cifarnet.evaluate <run> cifar10_c=CIFAR-10-C cifar10_1=CIFAR-10.1 cifar10h=cifar10h-probs.npy
  python -m cifarnet.evaluate <run> 'ood=[svhn,noise,pictures]'        out-of-distribution detection
  python -m cifarnet.evaluate <run> features=true                      features.npz, a linear probe, nearest neighbors
"""

import os
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cifarnet import cli
from cifarnet.allowlist import locate
from cifarnet.config import deciding_settings
from cifarnet.errors import UserError, printable
from cifarnet.inference.settings import prepare, without_data
from cifarnet.system import files


def evaluate(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a checkpoint, and write `report.html`, its figures, `metrics.json` and `predictions.csv`, with a row for
    each test image, to the folder `evaluation`.

    Args:
        path: a run's folder, a checkpoint file or the name of a trained network; for an ensemble, several of them, each
            of which counts once, or the folder of a sweep.
        overrides: overrides of `configs/evaluate.yaml`, such as "tta=mirror".

    Returns:
        The content of `metrics.json` (see `records.evaluation.Evaluation`). Accuracies are from 0 to 1.

    Raises:
        UserError: the checkpoint, a setting or the data cannot be used; the message says what to do.
    """
    # imported here, because they take seconds and `--help` does not need them
    from cifarnet.build import make_data
    from cifarnet.checkpoint import is_run
    from cifarnet.evaluation import members, ood, public_sets, report, sections
    from cifarnet.inference import ensemble, test_images
    from cifarnet.inference.trained import load
    from cifarnet.records.collect import num_parameters, plain
    from cifarnet.records.evaluation import Evaluation
    from cifarnet.records.figures import accuracy, save
    from cifarnet.records.tables import column_table, csv_text, row_table
    from cifarnet.system import hardware

    settings = prepare("evaluate", without_data(overrides))
    paths = [path] if isinstance(path, str | Path) else path
    unique = dict.fromkeys(file for one in paths for file in ensemble.expand(one))
    classifiers = [load(file, locate(settings.classes)) for file in unique]
    checkpoints = [classifier.checkpoint for classifier in classifiers]
    checkpoint, count = checkpoints[0], len(checkpoints)
    chosen = [*overrides, *ensemble.check(checkpoints, settings)]
    config = test_images.compose("evaluate", chosen, checkpoint, settings.classes)
    data = make_data(config)
    for one in checkpoints:
        one.check_task(data.class_names, data.image_size, str(one.path))
    public = public_sets.read(data, config.cifar10_c, config.cifar10_1, config.cifar10h)
    public = public._replace(ood=ood.read(config.ood, data, config.seed))
    predictor = ensemble.make_predictor(classifiers, config)
    if config.features:
        import sklearn  # noqa: F401  # an optional package: if it is missing, fail before anything takes long
    if config.attack == "autoattack":
        import pyautoattack  # noqa: F401

        if (number := len(data.class_names)) < 4:
            raise UserError(f"attack=autoattack needs at least 4 classes, but there are {number}. Use attack=pgd.")
    run, name, which = classifiers[0].run_record(), str(checkpoint.path), f"after epoch {checkpoint.epoch}"
    if count > 1:
        run, name, which = None, f"an ensemble of {count} runs", f"in {count} runs"
        config.output_dir = config.output_dir or f"lightning_logs/ensemble/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    folder = Path(config.output_dir or checkpoint.folder_for("evaluation"))
    if is_run(folder):
        raise UserError(f"output_dir={folder} is the folder of a run. Choose another folder to keep its record.")
    files.make_folder(folder, f"output_dir={folder} cannot be created")
    if (folder / "metrics.json").exists():
        print(printable(f"Replaces the evaluation in {folder}. To keep it, set output_dir=<folder>."), flush=True)
    config.output_dir = str(folder)
    about: Any = data.describe()
    network = " + ".join(dict.fromkeys(one.network_name for one in checkpoints))
    counts = f"{about['val']:,} validation and {about['test']:,} test images"
    print(printable(f"{network} {which}, on {about['source']}: {counts}"), flush=True)
    print(f"tta={predictor.tta}, {predictor.precision} on {predictor.device.type}", flush=True)
    measured, drawn = sections.measure(predictor, data, public, config)
    rows = measured.pop("predictions")  # in a file of their own, because there may be many
    evaluation = Evaluation(
        checkpoint=name,
        network=network,
        parameters=sum(num_parameters(classifier.network) for classifier in classifiers),
        epoch=max(one.epoch for one in checkpoints),
        class_names=checkpoint.class_names,
        tta=predictor.tta,
        tta_share=predictor.tta_share,
        precision=predictor.precision,
        data=about,
        training_settings=deciding_settings(run.resolved, times=True) if run else {},
        hardware=hardware.describe(predictor.device),
        versions=hardware.versions(),
        git_commit=hardware.git_commit(),
        command=shlex.join(["python", "-m", "cifarnet.evaluate", *(str(one.path) for one in checkpoints), *overrides]),
        config=plain(config, resolve=True),
        **measured,
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    evaluation.write(folder / "metrics.json")
    files.write(folder / "predictions.csv", csv_text(rows, rows[0]).encode(errors="surrogateescape"))
    if run:
        drawn["accuracy"] = accuracy([*run.history, *run.within_epochs])
    pictures = {name: folder / f"{name}.png" for name in drawn}
    for name, figure in drawn.items():
        save(figure, pictures[name])
    files.write(folder / "report.html", report.render(evaluation, pictures, run and run.name))
    if evaluation.members:
        print(printable(f"\n{column_table(members.table(evaluation.members, evaluation.test))}"))
    print(printable(row_table({**report.summary(evaluation), "report": os.path.relpath(folder / "report.html")})))
    return vars(evaluation)


def main() -> None:
    """Run `python -m cifarnet.evaluate`."""
    cli.run(lambda: evaluate(*cli.parse("evaluate", __doc__)[:2]))


if __name__ == "__main__":
    main()
