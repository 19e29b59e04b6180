"""Gradient accumulation: the number of optimizer steps of a run."""

import math

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def steps_in_epoch(trainer: L.Trainer, epoch: int) -> int:
    """Return the number of optimizer steps in an epoch (from 0), whose last step may use fewer batches."""
    size = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, GradientAccumulationScheduler):
            size = callback.get_accumulate_grad_batches(epoch)
    return math.ceil(trainer.num_training_batches / size)


def total_steps(trainer: L.Trainer) -> float:
    """Return the number of optimizer steps of a whole run; infinite if it has no end. It sets up the data."""
    if trainer.train_dataloader is None:  # Lightning does not need it to return max_steps
        trainer.fit_loop.setup_data()
    steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs or 0  # it ignores the callback
    if epochs < 1 or trainer.num_training_batches == math.inf:
        return steps
    counted = sum(steps_in_epoch(trainer, epoch) for epoch in range(epochs))
    return counted if trainer.max_steps < 0 else min(counted, trainer.max_steps)
