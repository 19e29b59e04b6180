"""torchvision's transforms in `data.transforms` compared with the recipes that do the same: images/s of the loader.

    python benchmarks/transforms.py

Each variant crops and flips the same images with the baseline's batch size, without training.
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import islice

import common
from cifarnet.build import make_data
from steps import compose_baseline

WARMUP, BATCHES = 5, 60  # numbers of batches; the warm-up is not measured
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


def images_a_second(overrides: Sequence[str], transforms: Sequence[str]) -> float:
    config = compose_baseline(*overrides, *transforms)
    batches = iter(make_data(config).train_dataloader())
    start = 0.0
    for step, _ in enumerate(islice(batches, WARMUP + BATCHES), 1):
        if step == WARMUP:
            start = time.perf_counter()
    return BATCHES * config.data.batch_size / (time.perf_counter() - start)


def main() -> None:
    sides = {name: partial(images_a_second, transforms=settings) for name, settings in SIDES.items()}
    values = common.take_turns(sides, common.parser(__doc__, turns=3).parse_args())
    common.report("transforms", "images/s", values, base="crop and flip only")


if __name__ == "__main__":
    main()
