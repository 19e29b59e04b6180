"""Compose, fit, test, report, and return the validation accuracy.

python -m cifarnet.train +experiment=baseline
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cifarnet import cli, sweep
from cifarnet.errors import UserError
from cifarnet.search import Search

if TYPE_CHECKING:  # torch and lightning take seconds to import: `--help` does without
    import lightning as L

    from cifarnet.data import ImageDataModule
    from cifarnet.module import Classifier

# settings on which no weight depends: where files lie, and what is but faster
WHERE = {"data.root", "data.url"}
SPEED = {"data.in_memory", "data.workers", "data.on_device", "model.side_by_side"}


def train(config: DictConfig) -> float:
    """Train, test the best checkpoint once, and write `metrics.json` into the run's folder.

    Args:
        config: as composed from `configs/train.yaml`; outside `python -m cifarnet.train`, set `output_dir`.

    Returns:
        The best validation accuracy, from 0 to 1.

    Raises:
        UserError: a setting, the data or the checkpoint cannot be used; the message says what to do.
        Interrupted: stopped by Ctrl-C or SIGTERM, after saving `last.ckpt`.
    """
    import lightning as L
    import torch
    from hydra.utils import instantiate

    from cifarnet import cpu, results
    from cifarnet.checkpoint import read
    from cifarnet.models import Normalize

    quieten_lightning()
    if config.trainer.precision == "auto":
        config.trainer.precision = best_precision(config.trainer.accelerator)
    check(config)
    if config.keep_freed_memory:
        cpu.keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    L.seed_everything(config.seed, verbose=False)

    trainer = make_trainer(config)
    datamodule: ImageDataModule = instantiate(config.data)
    datamodule.prepare_data()
    datamodule.setup()
    config.total_steps = total_steps(trainer, datamodule)

    network = instantiate(config.model, num_classes=len(datamodule.class_names), image_size=datamodule.image_size)
    for layer in network.modules():
        if isinstance(layer, Normalize):
            layer.fit(*datamodule.channel_statistics)
    start = time.perf_counter()
    if hasattr(network, "fit"):
        network.fit(datamodule.sample())
    fit_seconds = time.perf_counter() - start
    try:
        module: Classifier = instantiate(config.module, _partial_=True)(
            network=network,
            optimizer=instantiate(config.optimizer),
            scheduler=instantiate(config.get("scheduler")),
            recipe=recipe(config, network, datamodule),
        )
    except (TypeError, ValueError, ArithmeticError) as error:  # torch's optimizers and schedules refuse settings so
        raise UserError(f"optimizer, or scheduler of {config.total_steps} steps: {error}") from error
    if config.ckpt_path is not None:
        check_resumable(config, module)

    print(results.heading(config, module, datamodule), flush=True)
    trainer.fit(module, datamodule=datamodule, ckpt_path=config.ckpt_path)
    tested_epoch = trainer.current_epoch
    if trainer.checkpoint_callback and (path := trainer.checkpoint_callback.best_model_path):
        # not by trainer.test(ckpt_path=path), which would turn the callbacks back to that epoch as well
        best = read(path)
        module.load_state_dict(best["state_dict"])
        tested_epoch = best["epoch"] + 1
    trainer.test(module, datamodule=datamodule, verbose=False)

    metrics = results.collect(config, trainer, module, datamodule, tested_epoch, fit_seconds)
    results.write(metrics, Path(config.output_dir) / "metrics.json")
    results.log_hyperparameters(metrics, trainer.loggers)
    print(results.table(metrics, config.output_dir))
    return metrics["val_accuracy"]


def check(config: DictConfig) -> None:
    """Refuse settings that cannot work before anything is read or built."""
    for section in ("data", "model", "optimizer", "trainer", "module"):
        if "_target_" not in (config.get(section) or {}):
            raise UserError(f"{section} names nothing to build (no _target_). See the choices: --help")
    if not isinstance(config.name, str) or not config.name:
        raise UserError(f"name={config.name} has the wrong type: expected the name of a folder.")
    if not isinstance(config.seed, int) or config.seed < 0:
        raise UserError(f"seed={config.seed} has the wrong type: expected a whole number, 0 or more.")
    if config.threads is not None and not (isinstance(config.threads, int) and config.threads > 0):
        raise UserError(f"threads={config.threads}: expected a whole number of threads, or null.")
    for switch in ("compile", "keep_freed_memory", "channels_last"):
        if not isinstance(config[switch], bool):
            raise UserError(f"{switch}={config[switch]} has the wrong type: expected true or false.")
    cli.check_types(config)


def make_trainer(config: DictConfig) -> "L.Trainer":
    """The Trainer with its callbacks and logger."""
    import lightning as L
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    from cifarnet.callbacks import Compile, Prune

    chosen = [callback for callback in (config.get("callbacks") or {}).values() if callback]
    if config.data.get("val_fraction") == 0:  # nothing to choose a checkpoint by
        chosen = [callback for callback in chosen if not callback.get("monitor")]
    callbacks = [instantiate(callback) for callback in chosen]
    if config.compile:
        callbacks.append(Compile())
    if Search.trial is not None:
        callbacks.append(Prune(Search.trial))
    try:
        trainer: L.Trainer = instantiate(config.trainer, _partial_=True)(
            callbacks=callbacks,
            logger=instantiate(config.logger) if config.get("logger") else False,
        )
    except InstantiationException:
        raise
    except Exception as error:  # Lightning raises many types for settings it cannot use
        accelerator = config.trainer.accelerator
        if "accelerator" in str(error) or "backend" in str(error):
            raise UserError(
                f"trainer.accelerator={accelerator}: PyTorch finds no such device on this machine. "
                f"Choose trainer=auto or trainer=cpu, or install a PyTorch that supports it. ({error})"
            ) from error
        raise UserError(f"trainer: {error}") from error
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices={config.trainer.devices}: training on several devices is not supported. Use 1."
        )
    return trainer


def best_precision(accelerator: str) -> str:
    """bf16-mixed where the hardware computes in bfloat16, else 32-true."""
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())
    # elsewhere bf16 on a CPU is emulated, and slower than float32
    fast_on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if on_cpu and fast_on_cpu else "32-true"


def total_steps(trainer: "L.Trainer", datamodule: "ImageDataModule") -> int:
    """How often the optimizer steps in the whole run, for schedules."""
    batches, limit = len(datamodule.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = -(-batches // trainer.accumulate_grad_batches)  # an epoch
    steps = -1 if trainer.max_epochs in (None, -1) else trainer.max_epochs * steps
    limits = [limit for limit in (steps, trainer.max_steps) if limit != -1]
    if not limits:
        raise UserError("trainer.max_epochs=-1: a schedule needs an end. Give trainer.max_epochs or trainer.max_steps.")
    return min(limits)


def recipe(config: DictConfig, network: Any, datamodule: "ImageDataModule") -> dict[str, Any]:
    """What the checkpoint must hold to be used alone, as plain data."""
    from cifarnet import __version__
    from cifarnet.checkpoint import class_path

    plain: Any = OmegaConf.to_container(config, resolve=True)
    return {
        "cifarnet": __version__,
        "model": {
            **plain["model"],
            "_target_": class_path(type(network)),
            "num_classes": len(datamodule.class_names),
            "image_size": datamodule.image_size,
        },
        "class_names": list(datamodule.class_names),
        "config": plain,
        "overrides": cli.own_overrides(),
    }


def _what_decides(hparams: Any) -> dict[str, Any]:
    """The settings on which a run's weights depend, one level deep: not where files lie, nor how the test is made."""
    config = hparams["config"] | {"model": hparams["model"]}
    settings = {"seed": config["seed"], "class_names": hparams["class_names"]}
    for section in ("data", "model", "optimizer", "scheduler", "module"):
        settings |= {f"{section}.{key}": value for key, value in (config.get(section) or {}).items()}
    test_alone = {"module.tta", "module.tta_share"}
    return {key: value for key, value in settings.items() if key not in WHERE | SPEED | test_alone}


def check_resumable(config: DictConfig, module: "Classifier") -> None:
    """Compare the checkpoint with what is to go on from it."""
    from cifarnet.checkpoint import read

    before, now = (_what_decides(hparams) for hparams in (read(config.ckpt_path)["hyper_parameters"], module.hparams))
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in differing)
        raise UserError(
            f"ckpt_path={config.ckpt_path} belongs to a run with other settings: {changes}. Leave them as they were "
            "(and trainer.max_epochs, for which a schedule is planned), or train anew without ckpt_path."
        )


def quieten_lightning() -> None:
    """Warnings stay; notes about hardware found and advice that does not apply here go."""
    import logging
    import warnings

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()  # under Hydra every line would appear twice
        logger.setLevel(logging.WARNING)
    for message in (
        ".*exists and is not empty.*",  # the run's folder is also the logger's
        ".*smaller than the logging interval.*",  # metrics are logged once an epoch
        ".*does not have many workers.*",
        ".*treespec.*",
        ".*Total length of `list`.*",  # training without validation
    ):
        warnings.filterwarnings("ignore", message)


@hydra.main(version_base="1.3", config_path=str(cli.CONFIGS), config_name="train")
def _main(config: DictConfig) -> float:
    return sweep.run(config, train) if sweep.is_job() else train(config)


def main() -> None:
    """The command `python -m cifarnet.train`."""

    def task() -> None:
        sys.argv[1:] = sweep.with_resumed_sweep(cli.with_saved_overrides(sys.argv[1:]))
        sweep.Folder.path = None
        try:
            _main()
        finally:
            if sweep.Folder.path is not None:
                sweep.summarize(sweep.Folder.path)

    cli.run(task)


if __name__ == "__main__":
    main()
