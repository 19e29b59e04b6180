"""Write the trained networks of the package, src/cifarnet/trained/<name>: `python benchmarks/ladder.py --ship`.

The weights are those of the row's first seed, in float16. Computed in float32, the test accuracy must be that of the
run's own weights.
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
TOLERANCE = 0.0002  # the largest difference that float16 may make to the test accuracy
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

The weights are stored in float16. Computed in float32, this changes the test accuracy by {difference:+.2%}.

## Training

```text
command: python -m cifarnet.train {command} seed={seed}
images: {images}
commit: {commit}
hardware: {machine}
```

## Limits

The network knows ten classes of small photographs: {classes}. For pictures of
anything else, its probabilities are meaningless. It sees each picture at {size}×{size} pixels. Its accuracy is lower on
noisy or blurred pictures; `python -m cifarnet.evaluate {name} data=cifar10` measures this.
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
            weights = load_file(draft / HUB_WEIGHTS)
            halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
            save_file(halves, draft / HUB_WEIGHTS, {"format": "pt"})
            rounded = evaluate(draft, [*data, "precision=32-true", f"output_dir={temporary}/rounded"])
            difference = rounded["test"]["accuracy"] - exact["test"]["accuracy"]
            if abs(difference) > TOLERANCE:
                raise SystemExit(
                    f"{row.name}: float16 changes the test accuracy by {difference:.2%}. Nothing is written."
                )
            shipped = evaluate(draft, [*data, f"output_dir={temporary}/shipped"])
            settings = json.loads((draft / HUB_SETTINGS).read_text("utf-8"))
            record = Record.read(run / "metrics.json")
            split = {key: record.resolved["data"][key] for key in ("val_fraction", "split_seed")}
            settings |= {"data": {"_target_": "cifarnet.data.CIFAR10", **split}, "images": row.images}
            settings |= {"test_accuracy": shipped["test"]["accuracy"]}
            (draft / HUB_SETTINGS).write_text(json.dumps(settings, sort_keys=True, indent=2) + "\n", "utf-8")
            (draft / HUB_WEIGHTS).chmod(0o644)
            text = card(root, row, record, shipped, difference)
            (draft / "README.md").write_text(text, "utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(draft, folder)


def card(root: Path, row: Row, record: Record, shipped: dict[str, Any], difference: float) -> str:
    """Return the model card.

    Args:
        shipped: the evaluation of the weights in float16.
        difference: the test accuracy of these weights minus that of the run's own, both computed in float32.
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
        size=32,
    )
