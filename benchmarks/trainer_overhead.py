"""What Lightning's Trainer costs: `+experiment=baseline` beside a bare loop of the same step.

    python benchmarks/trainer_overhead.py [trainer=gpu]

- raw twin: the same loader, training step, autocast, optimizer and schedule in a for loop
- lean: the Trainer with `callbacks=lean`
- ordinary: the Trainer with the default callbacks and TensorBoard, its checkpoints and validation left out
"""

import tempfile
from collections.abc import Sequence

import common
import torch
from hydra.utils import instantiate
from steps import BATCHES, WARMUP, Timer, compose_baseline, make_data, make_module, make_trainer, now


def raw_twin(overrides: Sequence[str]) -> float:
    """Milliseconds a step."""
    config = compose_baseline(*overrides)
    module, data = make_module(config), make_data(config)
    data.trainer = make_trainer(config, [])  # it knows the device
    device = data.trainer.strategy.root_device
    module.to(device).train()
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    bf16 = "bf16" in config.trainer.precision
    start = 0.0
    for step, (images, labels) in enumerate(data.train_dataloader(), 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = module.training_step((images, labels), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step == WARMUP:
            start = now(device)
        if step == WARMUP + BATCHES:
            break
    return 1000 * (now(device) - start) / BATCHES


def lean(overrides: Sequence[str]) -> float:
    """Milliseconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose_baseline("callbacks=lean", f"output_dir={folder}", *overrides)
        callbacks = [instantiate(callback) for callback in config.callbacks.values()]
        timer = Timer()
        trainer = make_trainer(config, [*callbacks, timer])
        trainer.fit(make_module(config), datamodule=make_data(config))
        return 1000 * timer.seconds_a_step


def ordinary(overrides: Sequence[str]) -> float:
    """Milliseconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose_baseline(f"output_dir={folder}", "callbacks.best=null", "callbacks.last=null", *overrides)
        callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback]
        timer = Timer()
        settings = {"logger": instantiate(config.logger), "enable_progress_bar": True}
        trainer = make_trainer(config, [*callbacks, timer], **settings)
        trainer.fit(make_module(config), datamodule=make_data(config))
        return 1000 * timer.seconds_a_step


def main() -> None:
    sides = {"raw twin": raw_twin, "Trainer, lean": lean, "Trainer, ordinary": ordinary}
    arguments = common.parser(__doc__, turns=7).parse_args()
    values = common.take_turns(sides, arguments)
    config = compose_baseline(*arguments.overrides)
    facts = {"batch size": config.data.batch_size, "precision": config.trainer.precision}
    common.report("trainer_overhead", "ms a step", values, base="raw twin", **facts)


if __name__ == "__main__":
    main()
