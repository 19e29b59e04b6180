"""Ablation of the speedrun: `+experiment=speedrun_fast` with one change at a time.

    python benchmarks/ablation.py [--turns 2] [data=folder data.root=…]

The accuracy is measured on a tenth of the training images, which are set aside, so that nothing is selected on the test
set. The last column is the gain from test-time augmentation in test accuracy.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from cifarnet.models import SpeedNet
from cifarnet.models.convolution import Conv3x3


class RandomFilters(SpeedNet):
    """Use random fixed first filters instead of whitening filters, with the same mean magnitude of the activations."""

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        super().fit(images)
        pixels, whitening = self.normalize(images), self.whiten.filters.clone()
        nn.init.normal_(self.whiten.filters)
        sizes = [F.conv2d(pixels, filters).square().mean().sqrt() for filters in (whitening, self.whiten.filters)]
        self.whiten.filters *= sizes[0] / sizes[1]


class NoIdentity(SpeedNet):
    """Initialize convolutions with random weights, without the identity."""

    def __init__(self, num_classes: int = 10, image_size: int = 32, **settings) -> None:
        super().__init__(num_classes, image_size, **settings)
        for convolution in self.modules():
            if isinstance(convolution, Conv3x3):
                convolution.reset_parameters()


PARTS = {
    "as configured": [],
    "without images side by side (models/convolution.py)": ["+model.side_by_side=false"],
    "random first filters": ["model._target_=ablation.RandomFilters"],
    "no identity in the first weights": ["model._target_=ablation.NoIdentity"],
    "random instead of alternating flip": ["data.flip=random"],
    "no crops": ["data.crop_padding=0"],
    "no label smoothing": ["objective.label_smoothing=0"],
    "all epochs at 32x32": ["data.train_sizes=null"],
    "all images in every epoch": ["data.hardest_share=1"],
    "all images in 3 epochs": ["data.hardest_share=1", "trainer.max_epochs=3", "data.train_sizes=[24,24,32]"],
    "batches of 2,000, rates as in airbench94_muon": [
        *("data.batch_size=2000", "optimizer.lr=0.24", "optimizer.bias.lr=106", "optimizer.matrix.lr=0.02"),
    ],
    "SGD instead of Muon": ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=5e-4"],
    "ReLU network of the baseline": ["model=cnn"],
}


def run(overrides: list[str]) -> dict[str, float]:
    """Return the validation accuracy and the gain from test-time augmentation, in percent, and the seconds."""
    metrics = common.train("speedrun_fast", "data.val_fraction=0.1", *overrides)
    gain = metrics["test_accuracy"] - metrics["test_accuracy_one_view"]
    return {"accuracy": 100 * metrics["val_accuracy"], "tta": 100 * gain, "seconds": metrics["seconds"]}


def main() -> None:
    parser = common.parser(__doc__, turns=1)
    arguments = parser.parse_args()
    chosen = {name: part for name, part in PARTS.items() if not arguments.only or name in arguments.only}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for seed in range(arguments.turns):
        for name, part in chosen.items():
            runs[name].append(run([*arguments.overrides, *part, f"seed={seed}"]))
            print(f"seed {seed}: {name}: {runs[name][-1]}", flush=True)
    print(
        "\n| | validation accuracy | seconds of training | test-time augmentation adds |\n| --- | ---: | ---: | ---: |"
    )
    for name, measured in runs.items():
        accuracy, seconds, gain = (
            statistics.mean(one[key] for one in measured) for key in ("accuracy", "seconds", "tta")
        )
        print(f"| {name} | {accuracy:.2f} % | {seconds:.0f} | {gain:.2f} |")
    common.report("ablation", "seconds", {name: [one["seconds"] for one in of] for name, of in runs.items()}, runs=runs)


if __name__ == "__main__":
    main()
