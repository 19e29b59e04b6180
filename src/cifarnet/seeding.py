"""Randomness as a function of (seed, epoch, purpose), so that runs are reproducible and resume exactly."""

import numpy as np
import torch


def derive(seed: int, epoch: int, purpose: str) -> int:
    """Return a seed for this epoch; different values of `purpose` give independent random numbers."""
    return int(np.random.SeedSequence([seed, epoch, *purpose.encode()]).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """Return a generator on the CPU, so that its random numbers do not depend on the device."""
    return torch.Generator().manual_seed(derive(seed, epoch, purpose))
