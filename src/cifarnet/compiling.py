"""torch.compile, whose time is told apart from training's."""

import time

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.errors import UserError


class Compile(Callback):
    """Compile the network, in place, and take a step on blank images of each size before training, to time it apart.

    Weights, statistics and random numbers are as before; so are the names in the checkpoint.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # the compilation and these steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        start = time.perf_counter()
        loader = trainer.train_dataloader
        channels = trainer.datamodule.source.train.images.shape[1]
        state = {name: value.clone() for name, value in module.network.state_dict().items()}
        module.network.compile()
        with torch.random.fork_rng():
            for size in dict.fromkeys(loader.sizes or [loader.image_size]):  # in the order of training
                shape = loader.batch_size, channels, size, size
                images = torch.zeros(shape, dtype=torch.uint8, device=module.device)
                try:
                    with trainer.precision_plugin.forward_context():
                        logits = module(images.contiguous(memory_format=module.memory_format))
                    logits.sum().backward()
                except Exception as error:
                    if "compiler" not in str(error):
                        raise
                    raise UserError(
                        "compile=true: PyTorch finds no working C++ compiler. Install one (g++), or leave it out."
                    ) from error
        module.zero_grad()
        module.network.load_state_dict(state)
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self.seconds = time.perf_counter() - start
        print(f"Compiled the network in {self.seconds:.1f} s.", flush=True)
