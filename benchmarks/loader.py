"""The in-memory loader compared with torchvision's per-image transforms in a DataLoader.

    python benchmarks/loader.py

Both shuffle, crop and flip the same images with the baseline's batch size, without training.
"""

import time
from collections.abc import Iterable, Sequence
from functools import partial

from torch.utils.data import DataLoader

import common
from cifarnet.build import make_data
from steps import BATCHES, WARMUP, compose_baseline
from throughput import Pictures


def images_a_second(loader: Iterable, batch_size: int) -> float:
    start = 0.0
    for step, _ in enumerate(loader, 1):
        if step == WARMUP:
            start = time.perf_counter()
        if step == WARMUP + BATCHES:
            break
    return BATCHES * batch_size / (time.perf_counter() - start)


def cifarnet(overrides: Sequence[str]) -> float:
    config = compose_baseline(*overrides)
    return images_a_second(make_data(config).train_dataloader(), config.data.batch_size)


def torchvision(overrides: Sequence[str], workers: int) -> float:
    config = compose_baseline(*overrides, "keep_freed_memory=false")
    train = make_data(config).source.train
    pictures = Pictures(train.images, train.labels, config.data.crop_padding)
    loader = DataLoader(pictures, config.data.batch_size, shuffle=True, num_workers=workers, drop_last=True)
    return images_a_second(loader, config.data.batch_size)


def main() -> None:
    sides = {
        "DataLoader, no workers": partial(torchvision, workers=0),
        "DataLoader, 2 workers": partial(torchvision, workers=2),
        "cifarnet": cifarnet,
    }
    values = common.take_turns(sides, common.parser(__doc__, turns=5).parse_args())
    common.report("loader", "images/s", values, base="DataLoader, 2 workers")


if __name__ == "__main__":
    main()
