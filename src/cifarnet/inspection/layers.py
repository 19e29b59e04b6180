"""The layers of a network: output shapes, parameters, multiply-adds and activation memory."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cifarnet.records.tables import column_table

HEADINGS = ("layer", "class", "output", " parameters", "multiply-adds (M)", "activations (MiB)")


def table(network: nn.Module, images: Tensor, depth: int | None) -> str:
    """Run a forward pass in training mode, and return a table of the modules up to a depth as text.

    Pass a copy of the network, because the statistics of batch norm layers change. (Lightning's ModelSummary counts
    FLOPs, too, but in evaluation mode, and it includes neither activation memory nor attention on a CPU.)

    Each row includes the modules in the module; the first row is the whole network. The output has no batch dimension;
    it is empty if the module is not called, or returns no tensor. Multiply-adds are those of convolutions, matrix
    products and attention for one image. Activations are what autograd keeps for the backward pass of the batch,
    including copies of the weights in a lower precision; memory shared by several modules is counted in the first.

    Args:
        images: a batch, [B, C, H, W].
        depth: the depth of the modules in the network; None returns all of them.
    """
    shapes: dict[nn.Module, Sequence[int]] = {}
    activations: Counter[str] = Counter()
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}

    def note_shape(module: nn.Module, inputs: Any, output: Any) -> None:
        shapes[module] = output.shape[1:] if isinstance(output, Tensor) else ()

    def count_bytes(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:  # autograd keeps it, so that no other tensor gets this address
            seen.add(storage.data_ptr())
            activations.update(dict.fromkeys(counter.mod_tracker.parents, storage.nbytes()))
        return tensor.detach()  # the tensor itself would keep a reference to its own graph

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch does not count
    formula = {attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    counter = FlopCounterMode(display=False, custom_mapping=formula)
    noting = nn.modules.module.register_module_forward_hook(note_shape)
    with noting, counter, torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor):
        _logits = network.train()(images)  # its graph keeps the activations
    cells, flops = [], counter.get_flop_counts()
    for name, module in network.named_modules():
        if depth is None or name.count(".") < depth:
            path = f"{type(network).__name__}.{name}".rstrip(".")
            parameters = sum(parameter.numel() for parameter in module.parameters())
            multiply_adds = sum(flops.get(path, {}).values()) / 2 / len(images)
            counts = f"{parameters:>11,}", f"{multiply_adds / 1e6:>17,.2f}", f"{activations[path] / 2**20:>17,.1f}"
            shape = "×".join(map(str, shapes.get(module, ())))
            cells.append((name or "(network)", type(module).__name__, shape, *counts))
    return column_table(dict(zip(HEADINGS, zip(*cells, strict=True), strict=True)))
