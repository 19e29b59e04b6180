"""The layers of a network: output shapes, parameters, multiply-adds and activation memory."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cifarnet.records.tables import column_table

MIB = 2**20


class Layer(NamedTuple):
    """A module, without the modules in it that have rows of their own.

    Attributes:
        name: the name in the network; empty for the network itself.
        kind: the name of the class.
        shape: the shape of the output without the batch dimension; None if the module is not called, or has another
            output than a tensor.
        parameters: the number of weights.
        multiply_adds: of convolutions, matrix products and attention, in one forward pass of one image.
        activations: the bytes that autograd keeps for the backward pass of the batch. Memory that several layers use is
            counted in the first of them; weights and statistics are not counted.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    multiply_adds: float
    activations: int


def layers(network: nn.Module, images: Tensor, depth: int | None = None) -> list[Layer]:
    """Run a forward pass in training mode, and return the layers that compute something.

    Statistics of batch norm layers change: pass a copy of the network.

    Args:
        images: a batch, [B, C, H, W].
        depth: the depth of the rows: modules that lie deeper are counted in the module at this depth. None lists all.
    """
    modules = dict(network.named_modules())
    shapes: dict[str, tuple[int, ...]] = {}
    parameters: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    kept = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    for name, parameter in network.named_parameters():
        parameters[name.rpartition(".")[0]] += parameter.numel()

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:  # the graph keeps it, so that its address is not used again
            kept.add(storage.data_ptr())
            innermost = max(counter.mod_tracker.parents - {"Global"}, key=len, default="")
            activations[innermost.partition(".")[2]] += storage.nbytes()
        return tensor.detach()  # the tensor itself would refer to its own graph

    def note_shape(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape[1:])

    hooks = [module.register_forward_hook(partial(note_shape, name)) for name, module in modules.items()]
    # torch does not count this operation
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    )
    with counter, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits = network.train()(images)  # noqa: F841  the graph lives as long as its output
    for hook in hooks:
        hook.remove()
    flops = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    flops[""] = counter.get_total_flops()
    rows: dict[str, list[float]] = {}
    for name, module in modules.items():
        below = [f"{name}.{child}".removeprefix(".") for child, _ in module.named_children()]
        alone = flops.get(name, 0) - sum(flops.get(child, 0) for child in below)
        row = ".".join(name.split(".")[:depth])
        counts = (parameters[name], alone / 2 / len(images), activations[name])
        rows[row] = [total + count for total, count in zip(rows.get(row, (0, 0, 0)), counts, strict=True)]
    return [
        Layer(name, type(modules[name]).__name__, shapes.get(name), int(weights), multiply_adds, int(memory))
        for name, (weights, multiply_adds, memory) in rows.items()
        if weights or multiply_adds or memory or (name in shapes and not [*modules[name].children()])
    ]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def table(rows: Sequence[Layer]) -> str:
    """Return the layers and their sums as text."""
    total = Layer("total", "", None, *(sum(column) for column in list(zip(*rows, strict=True))[3:]))
    lines = [*rows, total]
    numbers = {
        "parameters": [f"{line.parameters:,}" for line in lines],
        "multiply-adds (M)": [f"{line.multiply_adds / 1e6:,.2f}" for line in lines],
        "activations (MiB)": [f"{line.activations / MIB:,.1f}" for line in lines],
    }
    widths = {heading: max(len(heading), *map(len, cells)) for heading, cells in numbers.items()}
    return column_table(
        {
            "layer": [line.name or "(network)" for line in lines],
            "class": [line.kind for line in lines],
            "output": ["×".join(map(str, line.shape or ())) for line in lines],
            **{f"{key:>{widths[key]}}": [cell.rjust(widths[key]) for cell in cells] for key, cells in numbers.items()},
        }
    )
