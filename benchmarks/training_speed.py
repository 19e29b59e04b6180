"""Training throughput of `+experiment=baseline` beside a plain PyTorch loop of the same network.

    python benchmarks/training_speed.py

Both train the baseline's network with its optimizer and batch size, on the same pictures, cropped and flipped.

- cifarnet: `python -m cifarnet.train`'s own path, Lightning's Trainer included
- plain PyTorch: float32, NCHW, a DataLoader with two workers and torchvision's transforms for each image

They take turns; each turn measures some batches after a few to warm up. The table gives medians over all turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cifarnet.cli import CONFIGS
from cifarnet.data import ImageDataModule, Split
from cifarnet.results import hardware
from cifarnet.train import best_precision, quieten_lightning


class Timer(Callback):
    """Seconds from the end of batch number `warmup` to the end of the last one."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.start = self.end = 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _synchronize(module.device)
        self.end = time.perf_counter()
        if batch_idx + 1 == self.warmup:
            self.start = self.end


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(config: DictConfig, data: ImageDataModule, warmup: int, batches: int) -> float:
    """Seconds for `batches` batches."""
    timer = Timer(warmup)
    trainer: L.Trainer = instantiate(config.trainer, _partial_=True)(
        callbacks=[timer],
        logger=False,
        max_epochs=1,
        limit_train_batches=warmup + batches,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = instantiate(config.module, _partial_=True)(
        network=instantiate(config.model), optimizer=instantiate(config.optimizer)
    )
    trainer.fit(module, datamodule=data)
    return timer.end - timer.start


class Pictures(Dataset):
    """One image at a time, transformed as a PIL image is in most tutorials."""

    def __init__(self, split: Split, crop_padding: int) -> None:
        to_picture = v2.ToPILImage()
        self.pictures = [to_picture(image) for image in split.images]
        self.labels = split.labels.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(split.images.shape[-1], padding=crop_padding, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def plain(config: DictConfig, pictures: Pictures, device: torch.device, warmup: int, batches: int) -> float:
    """Seconds for `batches` batches."""
    network = instantiate(config.model).to(device)
    optimizer = instantiate(config.optimizer)(network.parameters())
    loader = iter(DataLoader(pictures, config.data.batch_size, shuffle=True, num_workers=2, drop_last=True))
    start = 0.0
    for batch in range(warmup + batches):
        images, labels = next(loader)
        loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _synchronize(device)
        if batch + 1 == warmup:
            start = time.perf_counter()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", type=int, default=100, help="measured in a turn")
    parser.add_argument("--warmup", type=int, default=10, help="batches before these")
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu")
    arguments = parser.parse_args()

    quieten_lightning()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = ["+experiment=baseline", "data=synthetic", f"trainer={arguments.accelerator}"]
        config = compose("train", overrides)
    config.trainer.precision = best_precision(config.trainer.accelerator)
    device = torch.device("cuda" if arguments.accelerator == "gpu" else "cpu")
    batches = arguments.warmup + arguments.batches
    config.data.train_size = max(10_000, int(1.2 * batches * config.data.batch_size))
    data: ImageDataModule = instantiate(config.data)
    data.setup()
    pictures = Pictures(data.source.train, config.data.crop_padding)

    sides: dict[str, Callable[[], float]] = {
        "plain PyTorch": partial(plain, config, pictures, device, arguments.warmup, arguments.batches),
        "cifarnet": partial(ours, config, data, arguments.warmup, arguments.batches),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.turns):
        for name, measure in sides.items():
            rates[name].append(arguments.batches * config.data.batch_size / measure())
            print(f"turn {turn + 1}: {name} {rates[name][-1]:,.0f} images/s", flush=True)

    machine = hardware(device)
    print(f"\n{machine['name']}, {machine['threads']} threads, torch {torch.__version__}, lightning {L.__version__}")
    print(
        f"batch {config.data.batch_size}, cifarnet in {config.trainer.precision}, medians of {arguments.turns} turns\n"
    )
    print("| training the baseline's network | images/s | ratio |\n| --- | ---: | ---: |")
    base = statistics.median(rates["plain PyTorch"])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"| {name} | {rate:,.0f} | {rate / base:.2f} |")


if __name__ == "__main__":
    main()
