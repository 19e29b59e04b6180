"""Train a network, test it, and record the result.

python -m cifarnet.train +experiment=baseline
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cifarnet import cli
from cifarnet.config import output_folder, validate
from cifarnet.errors import UserError
from cifarnet.sweeps.multirun import resume_arguments
from cifarnet.sweeps.task import run_hydra
from cifarnet.system import distributed, files, hardware
from cifarnet.system.log_output import disable_tensorflow, log_to_file, quiet_libraries, report

if TYPE_CHECKING:  # torch and lightning take seconds to import, and `--help` does not need them
    from lightning.pytorch.callbacks import Callback

    from cifarnet.build import Built
    from cifarnet.checkpoint import Checkpoint
    from cifarnet.data.shared_images import SharedImages
    from cifarnet.records.record import Record


def train(
    config: DictConfig,
    ckpt_path: "str | Path | Checkpoint | None" = None,
    callbacks: "Sequence[Callback]" = (),
    images: "SharedImages | None" = None,
) -> "Record":
    """Train a network, test its best checkpoint once, and write `metrics.json` into the run's folder.

    Args:
        config: a config composed from `configs/train.yaml`, as `cifarnet.cli.compose` returns it.
        ckpt_path: the checkpoint from which to resume a run with this config (`resuming.resume` returns both).
        callbacks: callbacks in addition to the callbacks of the config; they require a single device.
        images: the images that the previous run read.

    Returns:
        The record of the run, which is also its `metrics.json`; None on ranks other than 0.

    Raises:
        UserError: a setting, the data or the checkpoint cannot be used.
        Interrupted: a signal stopped the run, after saving `last.ckpt`.
    """
    from cifarnet.build import build
    from cifarnet.callbacks.loggers import log_results
    from cifarnet.checkpoint import Checkpoint, refuse_results
    from cifarnet.finetuning import expand
    from cifarnet.records import collect
    from cifarnet.records.record import Record

    quiet_libraries()
    disable_tensorflow()
    config = expand(config)
    validate(config)
    folder, is_rank_zero = output_folder(config), distributed.placement().rank == 0
    checkpoint = Checkpoint.open(ckpt_path) if isinstance(ckpt_path, str | Path) else ckpt_path
    if checkpoint is None:
        refuse_results(folder)
    run = {"config": cli.without_resolvers(config), "ckpt_path": checkpoint and str(checkpoint.path)}
    if (num_processes := distributed.num_processes(config.trainer)) > 1:
        if callbacks:
            raise UserError(f"Callbacks cannot be passed to {num_processes} processes: add them to the config.")
        distributed.launch(run, folder, num_processes)
        return Record.read(folder / "metrics.json")
    with files.exclusive(folder) if is_rank_zero else contextlib.nullcontext(), hardware.prepared_process(config):
        trainer, classifier, data, _ = built = build(config, callbacks, checkpoint, images)
        if checkpoint is not None:
            checkpoint.check_images(classifier.hparams)
            checkpoint.check_weights(classifier.network)
        if is_rank_zero:
            report(collect.heading(config, built, fresh=checkpoint is None))
            distributed.send_run(run, folder)
        trainer.fit(classifier, datamodule=data, ckpt_path=checkpoint and checkpoint.path, weights_only=True)
        epoch, step = load_best(built)  # on rank 0, which sends its weights to the other ranks when the test begins
        classifier.logs_test = False  # `log_results` logs the results of the run
        trainer.test(classifier, datamodule=data, verbose=False)
        record: Any = None
        if is_rank_zero:
            record = collect.collect(config, built, epoch, step)
            record.write(folder / "metrics.json")
            report(collect.summary(record, config.output_dir))
            log_results(record, trainer, classifier)
        return record


def load_best(built: "Built") -> tuple[int, int]:
    """Load the weights with the best validation accuracy, if saved; return their epoch (from 1) and step."""
    from cifarnet.checkpoint import Checkpoint

    trainer, classifier, *_ = built
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best or not trainer.is_global_zero:
        return trainer.current_epoch, trainer.global_step
    # trainer.test(ckpt_path=best) would also restore the callbacks' states of that epoch
    checkpoint = Checkpoint.open(best)
    classifier.network.load_state_dict(checkpoint.weights)
    return checkpoint.epoch, checkpoint.step


def command(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m cifarnet.train` with these arguments; None uses the arguments of this process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if (path := cli.value_of("ckpt_path", arguments)) not in (None, "null"):
        from cifarnet.resuming import resume

        config, checkpoint = resume(path, [argument for argument in arguments if cli.key_of(argument) != "ckpt_path"])
        log_to_file(Path(config.output_dir, "train.log"))
        train(config, checkpoint)
        return
    if cli.value_of("sweep.resume", arguments) is not None:
        arguments = resume_arguments(arguments)
    run_hydra(train, arguments)


def train_run(run: dict[str, Any]) -> None:
    """Train a run that another process describes: rank 0 under torchrun or srun, or the process that starts ranks."""
    config: Any = OmegaConf.create(run["config"])
    if distributed.placement().rank == 0:
        log_to_file(Path(config.output_dir, "train.log"))
    train(config, run["ckpt_path"])


def main(run_command: Callable[[], None] = command) -> None:
    """Run `python -m cifarnet.train`, or another command that trains."""
    is_rank = distributed.placement().world_size > 1
    cli.run((lambda: distributed.run_ranks(run_command, train_run)) if is_rank else run_command)


if __name__ == "__main__":
    main()
