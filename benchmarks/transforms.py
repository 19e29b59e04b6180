"""torchvision's transforms in `data.transforms` compared with the recipes that do the same: images/s of the loader.

    python benchmarks/transforms.py

Each variant crops and flips the same images with the baseline's batch size, without training.
"""

from functools import partial

import common
from loader import cifarnet

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


def main() -> None:
    sides = {name: partial(_images_a_second, more=settings) for name, settings in SIDES.items()}
    values = common.take_turns(sides, common.parser(__doc__, turns=3).parse_args())
    common.report("transforms", "images/s", values, base="crop and flip only")


def _images_a_second(overrides: list[str], more: list[str]) -> float:
    return cifarnet([*overrides, *more])


if __name__ == "__main__":
    main()
