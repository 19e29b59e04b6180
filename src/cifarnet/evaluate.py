"""Evaluate a trained network: write an HTML report on its accuracy, calibration, mistakes and robustness.

examples:
  python -m cifarnet.evaluate speedrun data=cifar10                    a trained network of this package
  python -m cifarnet.evaluate lightning_logs/baseline/<date_time>
  python -m cifarnet.evaluate <run> tta=mirror corruptions=false
  python -m cifarnet.evaluate <run> data=folder data.root=pictures     other images of the same classes
  python -m cifarnet.evaluate <run> attack=pgd                         adversarial accuracy
  python -m cifarnet.evaluate <run> cifar10_c=CIFAR-10-C cifar10_1=CIFAR-10.1 cifar10h=cifar10h-probs.npy
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


def evaluate(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a checkpoint, and write `report.html`, its figures and `metrics.json` to the folder `evaluation`.

    Args:
        path: a run's folder, a checkpoint file or the name of a trained network.
        overrides: overrides of `configs/evaluate.yaml`, such as "tta=mirror".

    Returns:
        The content of `metrics.json` (see `records.evaluation.Evaluation`). Accuracies are from 0 to 1.

    Raises:
        UserError: the checkpoint, a setting or the data cannot be used; the message says what to do.
    """
    # imported here, because they take seconds and `--help` does not need them
    from cifarnet.build import make_data
    from cifarnet.checkpoint import is_run
    from cifarnet.evaluation import adversarial, public_sets, report, sections
    from cifarnet.inference import test_images
    from cifarnet.inference.trained import load
    from cifarnet.records.collect import num_parameters, plain
    from cifarnet.records.evaluation import Evaluation
    from cifarnet.records.figures import accuracy, save
    from cifarnet.records.tables import row_table
    from cifarnet.system import hardware

    settings = prepare("evaluate", without_data(overrides))
    classifier = load(path, locate(settings.classes))
    checkpoint = classifier.checkpoint
    adversarial.check(settings.attack, len(checkpoint.class_names))
    config = test_images.compose("evaluate", overrides, checkpoint, settings.classes)
    data = make_data(config)
    checkpoint.check_task(data.class_names, data.image_size)
    public = public_sets.read(data, config.cifar10_c, config.cifar10_1, config.cifar10h)
    predictor = classifier.predictor(
        tta=config.tta,
        tta_share=checkpoint.tta_share if config.tta_share is None else config.tta_share,
        precision=config.precision,
        accelerator=config.accelerator,
    )
    folder = Path(config.output_dir or checkpoint.folder_for("evaluation"))
    if is_run(folder):
        problem = "is the folder of a run, whose record would be lost"
        raise UserError(f"output_dir={folder} {problem}. Choose another folder.")
    files.make_folder(folder, f"output_dir={folder} cannot be created")
    about: Any = data.describe()
    run, network = classifier.run_record(), checkpoint.network_name
    counts = f"{about['val']:,} validation and {about['test']:,} test images"
    print(printable(f"{network} after epoch {checkpoint.epoch}, on {about['source']}: {counts}"), flush=True)
    print(f"tta={predictor.tta}, {predictor.precision} on {predictor.device.type}", flush=True)
    measured, drawn = sections.measure(predictor, data, public, config)
    evaluation = Evaluation(
        checkpoint=str(checkpoint.path),
        network=network,
        parameters=num_parameters(classifier.network),
        epoch=checkpoint.epoch,
        class_names=checkpoint.class_names,
        tta=predictor.tta,
        tta_share=predictor.tta_share,
        precision=predictor.precision,
        data=about,
        training_settings=deciding_settings(run.resolved, times=True) if run else {},
        hardware=hardware.describe(predictor.device),
        versions=hardware.versions(),
        git_commit=hardware.git_commit(),
        command=shlex.join(["python", "-m", "cifarnet.evaluate", str(checkpoint.path), *overrides]),
        config=plain(config, resolve=True),
        **measured,
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    evaluation.write(folder / "metrics.json")
    if run:
        drawn["accuracy"] = accuracy([*run.history, *run.within_epochs])
    pictures = {name: folder / f"{name}.png" for name in drawn}
    for name, figure in drawn.items():
        save(figure, pictures[name])
    files.write(folder / "report.html", report.render(evaluation, pictures, run and run.name))
    print(printable(row_table({**report.summary(evaluation), "report": os.path.relpath(folder / "report.html")})))
    return vars(evaluation)


def main() -> None:
    """Run `python -m cifarnet.evaluate`."""
    cli.run(lambda: evaluate(*cli.parse_one("evaluate", __doc__)))


if __name__ == "__main__":
    main()
