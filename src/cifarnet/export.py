"""Export a trained network to a file that runs without this project, or to a folder for the Hugging Face Hub.

The exported network is compared with the original on test images, or on random pixels if the run's images are not
available. It is kept only if their logits agree; with 8-bit integers (format=onnx_int8), only if the accuracy on all
test images falls by at most `tolerance` points.

examples:
  python -m cifarnet.export speedrun                    a trained network of this package
  python -m cifarnet.export lightning_logs/baseline/<date_time>
  python -m cifarnet.export <run> format=torch_export output=cnn.pt2
  python -m cifarnet.export <run> format=onnx_int8      8-bit integers
  python -m cifarnet.export <run> format=hub            for the Hugging Face Hub, with a model card
"""

import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifarnet import __version__, cli
from cifarnet.allowlist import locate
from cifarnet.errors import NoImages, UserError, printable
from cifarnet.inference.settings import prepare, without_data
from cifarnet.schema import did_you_mean
from cifarnet.system import files

if TYPE_CHECKING:
    from torch import Tensor

    from cifarnet.inference.trained import Trained

BATCH_SIZES = (1, 7, 64)
TOLERANCE = 1e-4  # the largest allowed difference of the logits, in float32


def export(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Write a checkpoint's network in another format, and compare the two.

    Args:
        path: a run's folder, a checkpoint file or the name of a trained network.
        overrides: overrides of `configs/export.yaml`, such as "format=onnx".

    Returns:
        The exported file or folder.

    Raises:
        UserError: the checkpoint, a setting or the data cannot be used, a package that the format needs is not
            installed, or the exported network differs from the original.
    """
    # imported here, because they take seconds and `--help` does not need them
    import torch

    from cifarnet.inference import test_images
    from cifarnet.inference.trained import load

    config = prepare("export", without_data(overrides))
    form, classes = find_format(config.format), locate(config.classes)
    classifier = load(path, classes)
    target = _target(config.output, classifier, form.FILE)
    kind, data, size = "test", None, classifier.checkpoint.image_size
    try:
        data = test_images.load("export", overrides, classifier.checkpoint, config.classes)
        images, _ = test_images.sample(data.source.test, config.images)
    except NoImages as error:
        if hasattr(form, "write_measured"):
            raise UserError(f"format={config.format} needs training and test images. {error}") from error
        print(printable(f"No test images for the comparison: {error}"))
        kind, generator = "random", torch.Generator().manual_seed(config.seed)
        count = min(config.images, max(2, 2**28 // size**2))  # at most 800 MB
        images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
            draft = Path(folder, target.name)
            known = facts(classifier, images.shape[1])
            if hasattr(form, "write_measured"):
                result = form.write_measured(classifier, data, draft, known, config.tolerance)
            else:
                form.write(classifier, images[:1].repeat(2, 1, 1, 1), draft, known)
                result = _compare(classifier.network, form.load(draft, classes), images, kind)
            for file in draft.iterdir() if draft.is_dir() else [draft]:
                destination = target / file.relative_to(draft)
                destination.parent.mkdir(exist_ok=True)
                files.check_output(destination)
                os.replace(file, destination)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"output={target} cannot be written ({error.strerror}). Choose another path.") from error
    except Exception as error:  # tracing an unsupported network can raise many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"format={config.format} does not support this network: {reason[:300]}"
        raise UserError(f"{message.removesuffix('.')}. Choose another format.") from error
    print(printable(f"{os.path.relpath(target)}: {result}"))
    return target


def find_format(name: str) -> Any:
    """Import the module of a format, `cifarnet.formats.<name>`.

    Raises:
        UserError: there is no such format, or a package that it needs is not installed.
    """
    names = sorted(path.stem for path in Path(__file__).with_name("formats").glob("[a-z]*.py"))
    if name not in names:
        raise UserError(f"format={name} does not exist.{did_you_mean(name, names)} Choose one of {', '.join(names)}.")
    try:
        return importlib.import_module(f"cifarnet.formats.{name}")
    except ImportError as error:
        raise UserError(f"format={name} cannot be used ({error}). Install: pip install 'cifarnet[export]'") from error


def _target(output: str | None, classifier: "Trained", file: str) -> Path:
    """Return the path to write to: `output`, or `file` in the folder `exported`."""
    from cifarnet.checkpoint import HUB_WEIGHTS

    target = Path(output or classifier.checkpoint.folder_for("exported") / file).absolute()
    if output is None:
        files.refuse_links(target.parent, [target])
    if target.is_dir() and any(target.iterdir()) and not (target / HUB_WEIGHTS).is_file():
        raise UserError(f"output={target} is a folder with other files. Choose another path, such as {file}.")
    if not target.is_dir():
        files.check_output(target)
    files.make_folder(target.parent, f"output={target} cannot be written")
    return target


def facts(classifier: "Trained", channels: int) -> dict[str, Any]:
    """Return the information that a user of the exported file needs, as plain data. Accuracies are from 0 to 1."""
    size, names = classifier.checkpoint.image_size, classifier.class_names
    known = {
        "input": f"uint8 [batch, {channels}, {size}, {size}], RGB, not normalized: the network normalizes them",
        "output": f"logits, float32 [batch, {len(names)}]; softmax gives the probabilities of class_names",
        "class_names": names,
        "image_size": size,
        "epoch": classifier.checkpoint.epoch,
        "cifarnet": __version__,
    }
    if record := classifier.record():
        known |= {"test_accuracy": record.test_accuracy_one_view, "test_images": record.data["test"]}
        known |= {"measured_in": record.precision, "name": record.name}
        known |= {"seed": record.seed, "git_commit": record.git_commit}
    return known


def _compare(network: Callable, exported: Callable, images: "Tensor", kind: str) -> str:
    """Compare the logits of images [N, C, H, W] of a kind, in batches of each of `BATCH_SIZES`; return the result.

    Raises:
        UserError: the difference is not below `TOLERANCE`, or a predicted class differs.
    """
    import torch

    with torch.no_grad():
        expected, found = (
            torch.cat([function(batch) for size in BATCH_SIZES for batch in images.split(size)])
            for function in (network, exported)
        )
    difference = (found - expected).abs().max().item()
    if not difference < TOLERANCE or not torch.equal(found.argmax(1), expected.argmax(1)):
        raise UserError(
            f"The exported network differs from the original: by up to {difference:.1e} in the logits (allowed: "
            f"{TOLERANCE}), or in a predicted class. The export was deleted. Choose another format."
        )
    sizes = ", ".join(map(str, BATCH_SIZES))
    agreement = f"the same predictions on {len(images):,} {kind} images, in batches of {sizes}."
    return f"{agreement}\nThe largest difference between the logits is {difference:.1e}."


def main() -> None:
    """Run `python -m cifarnet.export`."""
    cli.run(lambda: export(*cli.parse_one("export", __doc__)))


if __name__ == "__main__":
    main()
