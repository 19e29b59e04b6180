"""Weight decay on matrices and kernels only."""

from typing import Any

from torch import nn


def decay_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Return a group of parameters with weight decay, and a group without: those with fewer than two dimensions."""
    parameters = list(network.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
