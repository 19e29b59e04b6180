"""torchvision's transforms in `data.transforms` compared with the recipes that do the same: images/s of the loader.

    python benchmarks/transforms.py

Each variant crops and flips the same images on one thread, with the baseline's batch size and without training. The
variants take turns in one process, whose processor time is measured.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import islice

import torch

import common
from cifarnet.build import make_data
from steps import compose_baseline

BATCHES = 12
V2 = "torchvision.transforms.v2"
SIDES = {
    "crop and flip only": [],
    "+recipe=jitter": ["+recipe=jitter"],
    "v2.ColorJitter": [f"data.transforms={{x: {{_target_: {V2}.ColorJitter, brightness: 0.4, contrast: 0.4}}}}"],
    "+recipe=erasing": ["+recipe=erasing"],
    "v2.RandomErasing": [f"data.transforms={{x: {{_target_: {V2}.RandomErasing}}}}"],
    "+recipe=trivialaugment": ["+recipe=trivialaugment"],
    "v2.TrivialAugmentWide": [f"data.transforms={{x: {{_target_: {V2}.TrivialAugmentWide}}}}"],
    "+recipe=randaugment": ["+recipe=randaugment"],
    "v2.RandAugment": [f"data.transforms={{x: {{_target_: {V2}.RandAugment}}}}"],
}


class Side:
    """A loader on one thread."""

    def __init__(self, settings: Sequence[str]) -> None:
        config = compose_baseline("threads=1", "data.train_size=3000", *settings)
        self.loader, self.batch_size = make_data(config).train_dataloader(), config.data.batch_size

    def images_a_second(self, epoch: int) -> float:
        """Return the images per second of processor time, so that other processes affect the result little."""
        self.loader.set_epoch(epoch)
        batches = iter(self.loader)
        next(batches)  # draws the random numbers of the epoch
        start = time.process_time()
        for _ in islice(batches, BATCHES):
            pass
        return BATCHES * self.batch_size / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="measurements of each variant")
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    sides = {name: Side(settings) for name, settings in SIDES.items()}
    values: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name, side in sides.items():
            values[name].append(side.images_a_second(turn))
    common.report("transforms", "images/s", values, base="crop and flip only")


if __name__ == "__main__":
    main()
