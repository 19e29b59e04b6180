"""torch.compile, whose duration is measured separately from training."""

import time
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

# causes of other errors if there is no working C++ compiler; torch has no public names for them
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from cifarnet.classifier import Classifier
from cifarnet.data.loader import BatchLoader
from cifarnet.errors import UserError, causes


class Compile(Callback):
    """Compiles the network in place, and warms it up before training.

    Args:
        mode: the mode of torch.compile; True means "default".

    Raises:
        UserError: PyTorch finds no C++ compiler.
    """

    def __init__(self, mode: bool | str = True) -> None:
        self.mode = "default" if mode is True else str(mode)
        self.seconds = 0.0  # the duration of the compilation and the warm-up

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        start = time.perf_counter()
        pl_module.network.compile(mode=self.mode)
        try:
            warm_up(trainer, pl_module)
        except Exception as error:
            if not any(isinstance(cause, CppCompileError | InvalidCxxCompiler) for cause in causes(error)):
                raise
            raise UserError("compile: no working C++ compiler found. Install g++ or set compile=false.") from error
        self.seconds = time.perf_counter() - start
        print(f"Compiled the network in {self.seconds:.1f} s.", flush=True)


def warm_up(trainer: L.Trainer, module: Classifier) -> None:
    """Run forward and backward passes on blank images of each size that training uses. Weights, statistics and random
    generators are not changed."""
    loader = trainer.train_dataloader
    assert isinstance(loader, BatchLoader)
    num_chans = cast("Any", trainer).datamodule.source.train.images.shape[1]
    state = {name: value.clone() for name, value in module.network.state_dict().items()}
    with torch.random.fork_rng():
        for size in dict.fromkeys(loader.sizes or [loader.image_size]):  # in the order of training
            images = torch.zeros(loader.batch_size, num_chans, size, size, dtype=torch.uint8, device=module.device)
            for _ in range(3 if module.device.type == "cuda" else 1):  # the second pass records a CUDA graph
                with trainer.precision_plugin.forward_context():
                    logits = module(images.contiguous(memory_format=module.memory_format))
                logits.sum().backward()
                module.zero_grad()
    module.network.load_state_dict(state)
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
