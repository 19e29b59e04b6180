"""Write a trained network as a file that runs without this project, or as a folder to share: pixels in, logits out.

What is written is run on test images, or on random pixels where the run's images are not here, and compared with the
network before it gets its place: it gives the same answers, or it is not there.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from cifarnet import __version__, cli
from cifarnet.allowlist import locate
from cifarnet.errors import NoImages, UserError, printable
from cifarnet.schema import Range, Seed, did_you_mean
from cifarnet.system import files

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from cifarnet.inference.trained import Trained

EXAMPLES = """\
  python -m cifarnet.export lightning_logs/baseline/<date_time>
  python -m cifarnet.export <run> format=torch_export output=cnn.pt2
  python -m cifarnet.export <run> format=hub            for Hugging Face's hub, with a model card
"""
TYPES = {"format": str, "output": str | None, "images": int, "seed": int, "classes": list[str]}
RANGES = {"images": Annotated[int, Range(1)], "seed": Seed}
BATCH_SIZES = (1, 7, 64)
TOLERANCE = 1e-4  # of logits, in float32


def export(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Write a checkpoint's network in another format, and see that it answers alike.

    Args:
        path: a run's folder or a checkpoint file.
        overrides: of `configs/export.yaml`, such as "format=onnx".

    Returns:
        Where it lies.

    Raises:
        UserError: the checkpoint, a setting or the data cannot be used, what the format needs is not installed, or what
            was written answers otherwise than the network.
    """
    from cifarnet import checkpoint

    path = checkpoint.find(path)
    content = checkpoint.read(path)

    from cifarnet.inference import test_images, trained  # these take seconds more: a wrong path is told before
    from cifarnet.system.log_output import quiet_libraries

    quiet_libraries()
    config, of_data = test_images.own("export", overrides, TYPES, RANGES)
    form = chosen(config.format)
    classes = locate(config.classes)
    classifier = trained.of(content, path, classes)
    target = place(config.output, path, form.FILE)
    try:
        of_run = test_images.configure("export", content, path, overrides, TYPES, RANGES)
        kind, (images, _) = "test", test_images.some(of_run, content, config.images)
    except NoImages as error:  # whoever has but a checkpoint can do without
        if of_data:
            raise
        print(printable(f"No test images to check with: {error}"))
        kind, images = "random", noise(content, config)
    with _temporary(target) as draft:
        try:
            form.write(classifier, images[:1].repeat(2, 1, 1, 1), draft, facts(classifier, images.shape[1]))
            exported = form.load(draft, classes)
        except (UserError, OSError):
            raise
        except Exception as error:  # whatever a network of the user's makes torch's tracing and the formats raise
            reason = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
            raise UserError(
                f"format={config.format} cannot hold this network ({reason[:300]}). Try another."
            ) from error
        difference = compared(classifier.network, exported, images)
        move(draft, target)
    sizes = ", ".join(map(str, BATCH_SIZES))
    print(
        printable(
            f"{os.path.relpath(target)}: {len(images):,} {kind} images, in batches of {sizes}, get the same answers."
        )
    )
    print(f"The largest difference of logits is {difference:.1e}.")
    return target


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A place of the target's name in a folder beside it, which is removed in the end."""
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
            yield Path(folder) / target.name
    except OSError as error:
        raise UserError(f"output={target} cannot be written ({error.strerror}). Choose another.") from error


def noise(content: Mapping[str, Any], config: "DictConfig") -> "Tensor":
    """Images of pixels that are drawn one by one, uint8 [N, 3, image_size, image_size]."""
    import torch

    size, drawn = int(content["hyper_parameters"]["image_size"]), torch.Generator().manual_seed(config.seed)
    count = min(config.images, max(2, 2**28 // size**2))  # a stranger's size may be large
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=drawn)


def chosen(name: str) -> ModuleType:
    """The module that writes a format.

    Raises:
        UserError: there is none, or what it needs is not installed.
    """
    from cifarnet import formats

    known = [path.stem for path in Path(formats.__file__).parent.glob("[a-z]*.py")]
    if name not in known:
        meant = did_you_mean(name, known)
        raise UserError(f"format={name} is not known.{meant} There are: {', '.join(sorted(known))}.")
    try:
        return importlib.import_module(f"cifarnet.formats.{name}")
    except ImportError as error:
        raise UserError(f"format={name} needs {error.name}: pip install 'cifarnet[export]'") from error


def place(output: str | None, path: Path, file: str) -> Path:
    """Where to write: `output`, else in the run's folder `exported`, or beside a checkpoint that was moved."""
    from cifarnet.checkpoint import SHARED
    from cifarnet.inference.trained import folder_for

    target = folder_for(path, "exported") / file if output is None else Path(output).resolve()
    if output is None:
        files.refuse_links(target.parent.parent, [target.parent, target])
    elif target.suffix != Path(file).suffix:
        ending = Path(file).suffix or "no ending"
        raise UserError(f"output={output}: name a {'file' if Path(file).suffix else 'folder'} with {ending}: {file}")
    if target.exists() and target.is_dir() != (not Path(file).suffix):
        kind = "folder" if target.is_dir() else "file"
        raise UserError(f"output={target} is a {kind}, which what is written is not. Choose another, such as {file}.")
    if target.is_dir() and any(target.iterdir()) and not (target / SHARED[0]).is_file():
        raise UserError(f"output={target} holds other files, which might be overwritten. Choose a new folder.")
    files.make_folder(target.parent, f"output={target} cannot be written")
    return target


def facts(classifier: "Trained", channels: int) -> dict[str, Any]:
    """What one who has nothing but the file needs to know of it, as plain data; accuracies from 0 to 1."""
    size, names = classifier.image_size, classifier.class_names
    told = {
        "input": f"uint8 [batch, {channels}, {size}, {size}], RGB, as they are: normalisation is inside",
        "output": f"logits, float32 [batch, {len(names)}], of one view; softmax gives the probabilities of class_names",
        "class_names": names,
        "image_size": size,
        "epoch": classifier.epoch,
        "cifarnet": __version__,
    }
    if record := classifier.record():
        told |= {"test_accuracy": record["test_accuracy_one_view"], "test_images": record["data"]["test"]}
        told |= {"measured_in": record["precision"]} | {key: record[key] for key in ("name", "seed", "git_commit")}
    return told


def compared(network: Callable, exported: Callable, images: "Tensor") -> float:
    """The largest difference of logits, over images [N, C, H, W] in batches of each of `BATCH_SIZES`.

    Raises:
        UserError: it is not under `TOLERANCE`, or an image gets another class.
    """
    import torch

    largest = 0.0
    for size in BATCH_SIZES:
        for batch in images.split(size):
            with torch.inference_mode():
                expected = network(batch)
            with torch.no_grad():
                answers = exported(batch)
            if not expected.isfinite().all():
                raise UserError("The network's answers are no finite numbers: there is nothing to export.")
            difference = (answers - expected).abs().max().item() if answers.shape == expected.shape else float("nan")
            if not difference < TOLERANCE or not torch.equal(answers.argmax(1), expected.argmax(1)):
                raise UserError(
                    f"What was written answers otherwise than the network: by {difference:.1e} in a batch of {size} "
                    f"(under {TOLERANCE} is allowed, and the same class). Nothing is kept; try another format."
                )
            largest = max(largest, difference)
    return largest


def move(draft: Path, target: Path) -> None:
    """A file, or the files of a folder, take the place of those of their names."""
    if draft.is_dir():
        target.mkdir(exist_ok=True)
    for file in draft.iterdir() if draft.is_dir() else [draft]:
        os.replace(file, target / file.name if draft.is_dir() else target)


def _command() -> None:
    export(*cli.parse_one("export", __doc__, EXAMPLES))


def main() -> None:
    """The command `python -m cifarnet.export`."""
    cli.run(_command)


if __name__ == "__main__":
    main()
