"""Overhead of Lightning's Trainer: `+experiment=baseline` compared with a bare loop with the same step.

    python benchmarks/trainer_overhead.py [trainer=gpu]

- raw twin: the same loader, training step, autocast, optimizer and schedule in a `for` loop
- lean: the Trainer with `callbacks=lean`
- ordinary: the Trainer with the default callbacks and TensorBoard, without checkpoints and validation
"""

import tempfile
from collections.abc import Sequence

import torch

import common
from cifarnet.trainer import make_trainer
from steps import BATCHES, WARMUP, build_steps, compose_baseline, now, seconds_a_step


def raw_twin(overrides: Sequence[str]) -> float:
    """Return the milliseconds per step."""
    trainer, classifier, data, _ = build_steps(compose_baseline(*overrides))
    data.trainer = trainer  # so that the loader uses its device
    device = trainer.strategy.root_device
    classifier.to(device).train()
    optimizer = classifier.make_optimizer(classifier.network.parameters())
    scheduler = classifier.make_scheduler(optimizer, WARMUP + BATCHES)
    bf16 = "bf16" in trainer.precision
    start = 0.0
    for step, batch in enumerate(data.train_dataloader(), 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = classifier.training_step(batch, step)["loss"]
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
    """Return the milliseconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose_baseline("callbacks=lean", f"output_dir={folder}", *overrides)
        return 1000 * seconds_a_step(config, check_val_every_n_epoch=1)


def ordinary(overrides: Sequence[str]) -> float:
    """Return the milliseconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = ["callbacks=default", "callbacks.best=null", "callbacks.last=null", "logger=tensorboard"]
        config = compose_baseline(*chosen, f"output_dir={folder}", *overrides)
        return 1000 * seconds_a_step(config, enable_progress_bar=True)


def main() -> None:
    sides = {"raw twin": raw_twin, "Trainer, lean": lean, "Trainer, ordinary": ordinary}
    arguments = common.parser(__doc__, turns=7).parse_args()
    values = common.take_turns(sides, arguments)
    config = compose_baseline(*arguments.overrides)
    facts = {"batch size": config.data.batch_size, "precision": make_trainer(config).precision}
    common.report("trainer_overhead", "ms a step", values, base="raw twin", **facts)


if __name__ == "__main__":
    main()
