"""What each part of a recipe brings: `+experiment=speedrun_fast` with one thing changed at a time.

    python benchmarks/ablation.py [--turns 2] [data=folder data.root=…]

A tenth of the training images is set aside, and accuracy is that on them, so that nothing is chosen by the test set.
"""

import statistics

import common

PARTS = {
    "as configured": [],
    "without images side by side (models/convolution.py)": ["+model.side_by_side=false"],
    "random instead of alternating flip": ["data.flip=random"],
    "no crops": ["data.crop_padding=0"],
    "no label smoothing": ["module.label_smoothing=0"],
    "all epochs at 32x32": ["data.train_sizes=null"],
    "batches of 2,000, rates as in airbench94_muon": [
        *("data.batch_size=2000", "optimizer.lr=0.24", "optimizer.bias.lr=106", "optimizer.matrix.lr=0.02"),
    ],
    "SGD instead of Muon": [
        *("optimizer=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=5e-4", "~optimizer.bias", "~optimizer.matrix"),
    ],
    "ReLU network of the baseline": ["model=cnn"],
}


def run(overrides: list[str]) -> dict[str, float]:
    """Validation accuracy in percent, without test-time augmentation, and seconds of training."""
    metrics = common.train("speedrun_fast", "data.val_fraction=0.1", *overrides)
    return {"accuracy": 100 * metrics["val_accuracy"], "seconds": metrics["seconds"]}


def main() -> None:
    parser = common.parser(__doc__, turns=1)
    arguments = parser.parse_args()
    chosen = {name: part for name, part in PARTS.items() if not arguments.only or name in arguments.only}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for seed in range(arguments.turns):
        for name, part in chosen.items():
            runs[name].append(run([*arguments.overrides, *part, f"seed={seed}"]))
            print(f"seed {seed}: {name}: {runs[name][-1]}", flush=True)
    print("\n| | validation accuracy | seconds of training |\n| --- | ---: | ---: |")
    for name, measured in runs.items():
        accuracy, seconds = (statistics.mean(one[key] for one in measured) for key in ("accuracy", "seconds"))
        print(f"| {name} | {accuracy:.2f} % | {seconds:.0f} |")
    common.report("ablation", "seconds", {name: [one["seconds"] for one in of] for name, of in runs.items()}, runs=runs)


if __name__ == "__main__":
    main()
