"""torch.compile, whose time is told apart from training's."""

import contextlib
import time
from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.errors import UserError


@contextlib.contextmanager
def telling_no_compiler(setting: str, remedy: str) -> Iterator[None]:
    """What PyTorch raises where it finds no compiler becomes a message about the setting that needs one."""
    try:
        yield
    except Exception as error:
        if "compiler" not in str(error):
            raise
        raise UserError(f"{setting}: PyTorch finds no working C++ compiler. {remedy}") from error


class Compile(Callback):
    """Compile the network, in place, and warm it up before training, to time it apart.

    Args:
        mode: one of torch.compile's; True: "default".
    """

    def __init__(self, mode: bool | str = True) -> None:
        self.mode = "default" if mode is True else mode
        self.seconds = 0.0  # the compilation and the steps of the warm-up

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        start = time.perf_counter()
        module.network.compile(mode=self.mode)
        with telling_no_compiler("compile=true", "Install one (g++), or leave it out."):
            warm_up(trainer, module)
        self.seconds = time.perf_counter() - start
        print(f"Compiled the network in {self.seconds:.1f} s.", flush=True)


def warm_up(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Passes forward and backward on blank images of each size that training will have.

    Weights, statistics and random numbers are as before.
    """
    loader = trainer.train_dataloader
    channels = trainer.datamodule.source.train.images.shape[1]
    state = {name: value.clone() for name, value in module.network.state_dict().items()}
    with torch.random.fork_rng():
        for size in dict.fromkeys(loader.sizes or [loader.image_size]):  # in the order of training
            shape = loader.batch_size, channels, size, size
            images = torch.zeros(shape, dtype=torch.uint8, device=module.device)
            for _ in range(3 if module.device.type == "cuda" else 1):  # a CUDA graph is recorded in the second pass
                with trainer.precision_plugin.forward_context():
                    logits = module(images.contiguous(memory_format=module.memory_format))
                logits.sum().backward()
                module.zero_grad()
    module.network.load_state_dict(state)
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
