"""Muon for convolutions and SGD for all other parameters, in one optimizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def orthogonalize(matrices: Tensor, steps: int = 3) -> Tensor:
    """Move the singular values of matrices [B, rows, columns] towards 1 by Newton-Schulz iterations.

    Each iteration is X ← aX + bXXᵀX + c(XXᵀ)²X, with coefficients that maximize the slope at 0. The singular values
    reach about 0.5 to 1.5, which suffices for an update (Jordan et al., 2024,
    https://kellerjordan.github.io/posts/muon/). The computation is in bfloat16 unless the matrices are float64.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if matrices.dtype == torch.float64 else matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # bA + cA²
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT


class Muon(Optimizer):
    """Orthogonalized momentum for convolutions; SGD with Nesterov momentum for biases and matrices.

    Before every step, a convolution's weight, as a matrix [out_chans, in_chans × height × width], is scaled to the norm
    √out_chans. The update is the learning rate times the orthogonal matrix that is approximately nearest to the
    momentum (`orthogonalize`). Convolutions of the same shape are orthogonalized together. The other parameters are
    updated by SGD with separate settings. Source: Jordan et al. (2024, https://kellerjordan.github.io/posts/muon/), as
    in airbench94_muon.

    Args:
        params: the parameters. Those with 4 dimensions are convolutions, with 0 or 1 biases, and all others matrices.
        lr, momentum, steps: the settings for convolutions; `steps` is the number of Newton-Schulz iterations.
        bias, matrix: the `lr`, `momentum` and `weight_decay` of SGD for biases and for matrices.

    Raises:
        ValueError: a rate or momentum is negative, or the parameters are in groups, as with module.no_decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.24,
        momentum: float = 0.6,
        steps: int = 3,
        bias: Mapping[str, float] | None = None,
        matrix: Mapping[str, float] | None = None,
    ) -> None:
        kinds: dict[str, list[Tensor]] = {"convolution": [], "bias": [], "matrix": []}
        for parameter in params:
            if isinstance(parameter, dict):
                raise ValueError(
                    "Muon does not support the parameter groups of module.no_decay and recipe.backbone. Choose another "
                    "optimizer, such as optimizer=sgd, or set the rates and decays of Muon itself, such as matrix.lr."
                )
            kinds[{0: "bias", 1: "bias", 4: "convolution"}.get(parameter.ndim, "matrix")].append(parameter)
        sgd = {"lr": 0.01, "momentum": 0.85, "weight_decay": 0.0}
        settings: dict[str, dict[str, Any]] = {
            "convolution": {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "steps": steps},
            "bias": sgd | dict(bias or {}),
            "matrix": sgd | dict(matrix or {}),
        }
        for kind, values in settings.items():
            if kind != "convolution" and (unknown := values.keys() - sgd.keys()):
                raise ValueError(f"{kind} has no setting {min(unknown)}; it has {', '.join(sgd)}")
            for name, value in values.items():
                if value < 0:
                    raise ValueError(f"{kind}: {name}={value} is negative, but must be at least 0")
        groups = [{"params": kinds[kind], "kind": kind, **settings[kind]} for kind in kinds if kinds[kind]]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            if group["weight_decay"]:
                gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates = torch._foreach_add(gradients, buffers, alpha=group["momentum"])  # Nesterov momentum
            if group["kind"] == "convolution":
                updates = self._orthogonalized(updates, group["steps"])
                norms = torch._foreach_norm(parameters)
                scales = [len(p) ** 0.5 / norm for p, norm in zip(parameters, norms, strict=True)]
                torch._foreach_mul_(parameters, scales)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        return loss

    @staticmethod
    def _orthogonalized(updates: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Orthogonalize updates of the same shape together. The order of columns has no effect, so the order in memory
        is used, which is fastest."""
        result = list(updates)
        for shape in {update.shape for update in updates}:
            places = [place for place, update in enumerate(updates) if update.shape == shape]
            rows, chans, height, width = shape
            matrices = torch.stack([updates[place].permute(0, 2, 3, 1).flatten(1) for place in places])
            matrices = orthogonalize(matrices, steps).to(matrices.dtype)
            for place, matrix in zip(places, matrices, strict=True):
                result[place] = matrix.view(rows, height, width, chans).permute(0, 3, 1, 2)
        return result
