"""torch.compile, whose time is told apart from training's."""

import time

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class Compile(Callback):
    """Compile the network, in place, and take a step on blank images before training, to time it apart.

    Weights, statistics and random numbers are as before; so are the names in the checkpoint.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # the compilation and that step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        start = time.perf_counter()
        data = trainer.datamodule
        shape = (data.batch_size, *data.source.train.images.shape[1:])
        images = torch.zeros(shape, dtype=torch.uint8, device=module.device)
        state = {name: value.clone() for name, value in module.network.state_dict().items()}
        module.network.compile()
        with torch.random.fork_rng():
            with trainer.precision_plugin.forward_context():
                logits = module(images.contiguous(memory_format=module.memory_format))
            logits.sum().backward()
        module.zero_grad()
        module.network.load_state_dict(state)
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self.seconds = time.perf_counter() - start
        print(f"Compiled the network in {self.seconds:.1f} s.", flush=True)
