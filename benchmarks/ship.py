"""Write the trained networks of the package, src/cifarnet/trained/<name>: `python benchmarks/ladder.py --ship`.

The weights are those of the row's first seed, in float16. Computed in float32, the test accuracy must be that of the
run's own weights. The predictions of `speedrun` become docs/images/speedrun.png, the picture in the README.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import ladder_pages
from cifarnet import trained
from cifarnet.checkpoint import HUB_SETTINGS, HUB_WEIGHTS
from cifarnet.evaluate import evaluate
from cifarnet.export import export
from cifarnet.records.record import Record
from ladder_pages import Row

NAMES = ("baseline", "resnet20", "speedrun")
TOLERANCE = 2  # of 10,000 test images: the largest difference that float16 may make to the number of correct ones
CARD = """\
---
library_name: cifarnet
pipeline_tag: image-classification
tags: [image-classification, pytorch]
---
# {name}: {description}

## Use

```bash
python -m cifarnet.predict {name} picture.jpg
python -m cifarnet.evaluate {name} data=cifar10
python -m cifarnet.train +experiment=finetune model.checkpoint={name} data.root=pictures
```

```python
import cifarnet

classifier = cifarnet.load("{name}")
print(classifier.predict("picture.jpg")[0].label)
```

## Results

On the 10,000 test images of CIFAR-10 (20 of them from a JPEG copy):

| | |
| --- | --- |
| test accuracy of these weights | {accuracy:.2%} (95% interval {low:.2%} to {high:.2%}; tta={tta}, {precision}) |
| without test-time augmentation | {no_tta:.2%} |
| cross-entropy, expected calibration error | {cross_entropy:.4f}, {ece:.2%} |
| test accuracy of the recipe | {row}: mean ± standard deviation (number of seeds) |

The weights are stored in float16. Computed in float32, this changes the number of correct test images by {difference}.

## Training

```text
command: python -m cifarnet.train {command} seed={seed}
images: {images}
commit: {commit}
hardware: {machine}
```

## Limits

The network distinguishes ten classes: {classes}. For
pictures of anything else, its probabilities are meaningless. Each picture is resized to 32×32 pixels. The accuracy is
lower for noisy or blurred pictures; `python -m cifarnet.evaluate {name} data=cifar10` measures this.
"""


def ship(root: Path, rows: Sequence[Row], folders: Sequence[Path], overrides: Sequence[str]) -> None:
    """Write the folder of each row's network, from the run in the corresponding folder.

    Raises:
        SystemExit: the weights are less accurate in float16.
    """
    for row, run in zip(rows, folders, strict=True):
        folder = trained.FOLDER / row.name
        with tempfile.TemporaryDirectory() as temporary:
            draft = Path(temporary, row.name)
            data = [*overrides, "corruptions=false"]
            exact = evaluate(run, [*data, "precision=32-true", f"output_dir={temporary}/exact"])
            export(run, ["format=hub", f"output={draft}", *overrides])
            settings = json.loads((draft / HUB_SETTINGS).read_text("utf-8"))
            # without validation images: the archive of CIFAR-10 has another order, so another split, than a folder
            settings["data"] = {"_target_": "cifarnet.data.CIFAR10", "val_fraction": 0}
            (draft / HUB_SETTINGS).write_text(json.dumps(settings, sort_keys=True, indent=2) + "\n", "utf-8")
            weights = load_file(draft / HUB_WEIGHTS)
            halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
            save_file(halves, draft / HUB_WEIGHTS, {"format": "pt"})
            rounded = evaluate(draft, [*data, "precision=32-true", f"output_dir={temporary}/rounded"])
            correct = [round(result["test"]["accuracy"] * result["data"]["test"]) for result in (rounded, exact)]
            if abs(correct[0] - correct[1]) > TOLERANCE:
                raise SystemExit(
                    f"{row.name}: {correct[0]:,} correct test images in float16 and {correct[1]:,} in float32. "
                    "Nothing is written."
                )
            shipped = evaluate(draft, [*data, f"output_dir={temporary}/shipped"])
            record = Record.read(run / "metrics.json")
            (draft / HUB_WEIGHTS).chmod(0o644)
            text = card(root, row, record, shipped, correct[0] - correct[1])
            (draft / "README.md").write_text(text, "utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(draft, folder)
            if row.name == "speedrun":
                shutil.copyfile(run / "predictions.png", root / "docs/images/speedrun.png")


def card(root: Path, row: Row, record: Record, shipped: dict[str, Any], difference: int) -> str:
    """Return the model card.

    Args:
        shipped: the evaluation of the weights in float16.
        difference: how many more test images these weights classify correctly than the run's own, both in float32.
    """
    test = shipped["test"]
    low, high = test["interval"]
    return CARD.format(
        name=row.name,
        description=ladder_pages.description(ladder_pages.experiment(root, row.name)),
        accuracy=test["accuracy"],
        low=low,
        high=high,
        tta=shipped["tta"],
        precision=shipped["precision"],
        no_tta=shipped["test_accuracy_one_view"],
        cross_entropy=test["cross_entropy"],
        ece=test["calibration_error"],
        row=row.accuracy(),
        difference=difference,
        command=row.command,
        seed=record.seed,
        images=row.images,
        commit=record.git_commit,
        machine=row.machine,
        classes=", ".join(shipped["class_names"]),
    )
