"""Compose, build, fit, test, record, and return the validation accuracy.

python -m cifarnet.train +experiment=baseline
"""

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from cifarnet import cli
from cifarnet.errors import UserError
from cifarnet.sweeps import jobs
from cifarnet.system import distributed, files, hardware

if TYPE_CHECKING:  # torch and lightning take seconds to import: `--help` does without
    from lightning.pytorch.callbacks import Callback
    from optuna import Trial

    from cifarnet.build import Built

LOG = "[%(asctime)s] %(message)s"  # as in configs/train.yaml


def train(config: DictConfig, ckpt_path: str | Path | None = None, callbacks: "Sequence[Callback]" = ()) -> float:
    """Train, test the best checkpoint once, and write `metrics.json` into the run's folder.

    Args:
        config: as composed from `configs/train.yaml`; outside `python -m cifarnet.train`, set `output_dir`.
        ckpt_path: a last.ckpt of a run with this config, to go on from (`resuming.resume` gives both).
        callbacks: of Lightning's, more than the config has (on several devices, only the config's act on all).

    Returns:
        The best validation accuracy, from 0 to 1.

    Raises:
        UserError: a setting, the data or the checkpoint cannot be used; the message says what to do.
        Interrupted: stopped by Ctrl-C or SIGTERM, after saving `last.ckpt`.
    """
    with files.exclusive(Path(config.output_dir)), hardware.same_threads():
        return _train(config, ckpt_path, callbacks)


def _train(config: DictConfig, ckpt_path: str | Path | None, callbacks: "Sequence[Callback]") -> float:
    from cifarnet.callbacks.loggers import log_results
    from cifarnet.finetuning import expanded
    from cifarnet.records.collect import collect, heading, summary
    from cifarnet.resuming import check_same_images
    from cifarnet.sweeps.rank_job import build_run, job
    from cifarnet.system.log_output import report

    config = expanded(config)
    built = build_run(config, ckpt_path, callbacks)
    if ckpt_path is not None:
        check_same_images(ckpt_path, built)
    report(heading(config, built, fresh=ckpt_path is None))
    command = f"python -m cifarnet.train {cli.quoted('ckpt_path', config.output_dir)}"
    with distributed.leading(built.trainer, job(config, ckpt_path, callbacks, built.trainer.world_size), command):
        tested = fit_and_test(built)
    record = collect(config, built, *tested)
    record.write(Path(config.output_dir) / "metrics.json")
    log_results(record, built.trainer.loggers)
    report(summary(record, config.output_dir))
    return record.val_accuracy


def follow(job: distributed.Job) -> None:
    """A run in a rank other than 0: its share of every batch, and no word or file."""
    from cifarnet.sweeps.rank_job import build_told

    fit_and_test(build_told(job))


def fit_and_test(built: "Built") -> tuple[int, int]:
    """Epoch, from 1, and step whose weights were tested."""
    from cifarnet.resuming import Resume

    trainer, classifier, data, _ = built
    resuming = next((callback for callback in trainer.callbacks if isinstance(callback, Resume)), None)
    with resuming.blamed_for_errors() if resuming else contextlib.nullcontext():
        trainer.fit(classifier, datamodule=data, ckpt_path=resuming and resuming.path, weights_only=True)
    tested = load_best(built)  # in rank 0: testing begins with its weights everywhere
    trainer.test(classifier, datamodule=data, verbose=False)
    return tested


def load_best(built: "Built") -> tuple[int, int]:
    """Take over the weights with the best validation accuracy, where there are any; their epoch, from 1, and step."""
    from cifarnet import checkpoint

    trainer, classifier, *_ = built
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best or not trainer.is_global_zero:
        return trainer.current_epoch, trainer.global_step
    # not by trainer.test(ckpt_path=best), which would turn the callbacks back to that epoch as well
    content = checkpoint.read(best)
    classifier.load_state_dict(content["state_dict"])
    return content["epoch"] + 1, content["global_step"]


def _task(config: DictConfig, trial: "Trial | None" = None) -> float:
    if jobs.is_job():
        return jobs.run(config, _begin, trial)
    try:
        jobs.refuse_launcher()
        return _begin(config)
    except Exception:
        files.remove_if_unused(Path(config.output_dir))
        raise


def _begin(config: DictConfig, ckpt_path: Path | None = None, callbacks: "Sequence[Callback]" = ()) -> float:
    if config.ckpt_path is not None:
        raise UserError("ckpt_path is no setting of a config: give it in the command, for one run.")
    return train(config, ckpt_path, callbacks)


def command(arguments: Sequence[str]) -> None:
    """`python -m cifarnet.train` with these arguments."""
    if (path := cli.value_of("ckpt_path", arguments)) not in (None, "null"):
        from cifarnet.resuming import resume

        config, last = resume(path, [argument for argument in arguments if cli.key_of(argument) != "ckpt_path"])
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        logging.basicConfig(filename=Path(config.output_dir, "train.log"), level="INFO", format=LOG)
        train(config, last)
    elif cli.value_of("sweep.resume", arguments) is not None:
        cli.run_hydra(_task, jobs.resumed_sweep(arguments))
    else:
        cli.run_hydra(_task, arguments)


def main() -> None:
    """The command `python -m cifarnet.train`."""
    cli.run(lambda: distributed.run(lambda: command(sys.argv[1:]), follow))


if __name__ == "__main__":
    main()
