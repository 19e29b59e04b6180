"""Randomness as a function of (seed, epoch, purpose), so that a run repeats and resumes exactly."""

import numpy as np
import torch


def derive(seed: int, epoch: int, purpose: str) -> int:
    """A seed for this epoch; `purpose` keeps draws for different uses independent of each other."""
    return int(np.random.SeedSequence([seed, epoch, *purpose.encode()]).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator on the CPU (its draws are then the same for every device)."""
    return torch.Generator().manual_seed(derive(seed, epoch, purpose))
